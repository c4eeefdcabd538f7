"""``trimkv shares``: how much of a budget each layer of a model should have."""

from pathlib import Path
from types import SimpleNamespace

import click

from . import loading, reading, show
from .errors import UserError, mendable
from .options import model_options, numbers, output_options


@click.command(short_help="Find what share of the slots each layer should have.")
@click.option("--text", "texts", multiple=True, metavar="FILE...", help="A .txt or .jsonl file, also .gz.")
@click.argument("more_texts", nargs=-1, metavar="")
@click.option("--output", metavar="DIR", help="Write the gates with their shares into this folder.")
@click.option("--context", type=click.IntRange(min=3), default=2048, show_default=True, help="Tokens per sequence.")
@click.option("--max-sequences", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@click.option(
    "--measured-at",
    default="48,128,320,800",
    show_default=True,
    help="Slots per head of the one layer that is bounded, at least two numbers with commas between.",
)
@click.option(
    "--good-for", default="64,128,256,512", show_default=True, help="Budgets that the shares are to be good for."
)
@click.option("--least", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True)
@click.option(
    "--most", type=click.FloatRange(min=1), default=2.0, show_default=True, help="Limits of a share; 1 = mean."
)
@model_options
@output_options
def shares(**options):
    """Find what share of a budget each layer should have, for trained gates of a model.

    One layer at a time is bounded while all others see everything, at several budgets; what that costs in KL tells
    where slots save most. With --output the gates are written anew, with these shares: caches then split budgets so,
    and `trimkv train --gates DIR` trains with them. About as many passes over the texts as layers x budgets.
    """
    o = SimpleNamespace(**options)
    measured, good = sorted(numbers(o, "measured_at")), numbers(o, "good_for")
    if len(measured) < 2 or measured[-1] >= o.context:
        raise UserError(f"--measured-at {o.measured_at}: at least two numbers, each less than --context {o.context}")
    paths = [*o.texts, *o.more_texts]
    reading.check(paths)
    if o.output:
        loading.check_folder(Path(o.output))
    loading.check_model_name(o.model)
    loading.import_torch()
    choice = loading.choose(("trimkv",), o.model, o.gates)
    device = loading.pick_device(o.device)
    ids = reading.windows(paths, loading.load_tokenizer(o.model), o.context, o.max_sequences)
    dtype = "float32" if o.dtype == "auto" else o.dtype  # what a layer costs may be a millionth of a nat
    model = loading.load_model(o.model, device, dtype, choice.gates)
    from ..eval.layer_shares import layer_costs, share_out
    from ..gates.attach import resolve
    from ..gates.files import save_gates
    from ..hf.model import full_attention_modules

    with loading.quiet(), show.progress() as progress, mendable():
        costs = layer_costs(model, ids, measured, batch_size=o.batch_size, progress=progress("measuring"))
        found = share_out(costs, measured, good, o.least, o.most)
    layers = sorted(full_attention_modules(model))
    result = {"layers": layers, "layer_shares": found, "measured_at": measured, "kl": costs.tolist()}
    if o.output:
        with mendable((ValueError, OSError), doing=f"--output {o.output}"):
            save_gates(resolve(model, choice.gates), o.output, layer_shares=found)
        result["output"] = o.output
    show.emit(result) if o.as_json else _print(result)


def _print(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="KL in nats where only one layer is bounded, and its share of a budget")
    for heading in ("layer", *(f"{tokens:,} slots" for tokens in result["measured_at"]), "share"):
        table.add_column(heading, justify="right")
    for layer, share, costs in zip(result["layers"], result["layer_shares"], result["kl"], strict=True):
        table.add_row(str(layer), *(f"{cost:.6f}" for cost in costs), f"{share:.2f}")
    Console().print(table)
    if "output" in result:
        click.echo(f"written to {result['output']}")
