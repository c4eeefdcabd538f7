"""``trimkv shares``: how much of a budget each layer of a model should have."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import click

from .. import __version__, fingerprint
from ..train.run_folder import SHARES, check_free
from . import loading, outputs, reading, show
from .errors import UserError, mendable
from .options import finite, model_options, numbers, output_options, overwrite_option


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
@click.option(
    "--least",
    type=click.FloatRange(0, 1, min_open=True),
    callback=finite,
    default=0.5,
    show_default=True,
    help="The smallest share of a layer; 1 is the budget itself.",
)
@click.option(
    "--most", type=click.FloatRange(min=1), callback=finite, default=2.0, show_default=True, help="The largest one."
)
@overwrite_option
@model_options
@output_options
def shares(**options):
    """Find what share of a budget each layer should have, for trained gates of a model.

    One layer at a time is bounded while all others see everything, at several budgets; what that costs in KL tells
    where slots save most. A share of 1.5 gives a layer one and a half times the budget; the mean of all shares is 1.
    With --output the gates are written anew, with these shares: caches then split budgets so, and `trimkv train --gates
    DIR` trains with them. About as many passes over the texts as layers x budgets.
    """
    o = SimpleNamespace(**options)
    measured, good = sorted(numbers(o, "measured_at")), numbers(o, "good_for")
    if len(measured) < 2 or measured[-1] >= o.context:
        raise UserError(f"--measured-at {o.measured_at}: at least two numbers, each less than --context {o.context}")
    paths = [*o.texts, *o.more_texts]
    reading.check(paths)
    loading.check_model_name(o.model)
    loading.import_torch()
    choice = loading.choose(("trimkv",), o.model, o.gates)
    device = loading.pick_device(o.device)
    dtype = "float32" if o.dtype == "auto" else o.dtype  # what a layer costs may be a millionth of a nat
    asked = _asked(measured, good, device, dtype, o)
    _finished(o, asked)  # another question is refused before anything is loaded
    ids = reading.windows(paths, loading.load_tokenizer(o.model), o.context, o.max_sequences)
    model = loading.load_model(o.model, device, dtype, choice.gates)
    from ..gates.attach import resolve
    from ..hf.model import full_attention_modules
    from ..train.made_of import of_set, of_weights

    gates = resolve(model, choice.gates)
    names = ", ".join(dict.fromkeys(Path(path).name for path in paths))
    text = {"name": names, "digest": fingerprint.of_tensors([ids]), "sequences": len(ids)}
    made_of = {**asked, "text": text, "gates": of_set(gates), "weights": of_weights(model)}
    result = _finished(o, made_of)
    if result is not None:
        loading.note(f"{o.output} holds these shares: nothing is measured (--overwrite measures anew)")
    else:
        result = {
            "layers": sorted(full_attention_modules(model)),
            **_measure(model, ids, measured, good, o),
            **_made_by(made_of),
        }
        if o.output:
            result["output"] = o.output
            _save(gates, result, o)
    show.emit(result) if o.as_json else _print(result)


def _asked(measured, good, device: str, dtype: str, o: SimpleNamespace) -> dict:
    """Of what changes the shares, all that is known before anything is loaded."""
    from ..train.made_of import versions

    return {
        "command": "shares",
        "model": o.model,
        "context": o.context,
        "measured_at": measured,
        "good_for": list(good),
        "least": o.least,
        "most": o.most,
        "device": device,
        "dtype": dtype,
        "versions": {**versions(), "trimkv": __version__},
    }


def _finished(o: SimpleNamespace, made_of: dict) -> dict | None:
    """The shares that the folder holds already, if they were made of the same."""
    if not o.output:
        return None
    folder = Path(o.output)
    outputs.check_folder(folder)
    if o.overwrite or not (folder / SHARES).exists():
        with mendable():
            check_free(folder, o.overwrite)
        return None
    result = outputs.finished("--output", folder / SHARES, made_of, overwrite=False)
    with mendable():
        written = _gates_json(folder)
    if written.get("layer_shares") != result.get("layer_shares"):
        raise UserError(f"--output {folder} holds gates that are not those of its {SHARES}. {outputs.REPLACE}")
    return result


def _gates_json(folder: Path) -> dict:
    """What gates.json says."""
    from ..gates.files import load_gates

    return load_gates(folder).meta


def _measure(model, ids, measured, good, o: SimpleNamespace) -> dict:
    from ..eval.layer_shares import layer_costs, share_out

    with loading.quiet(), show.progress() as progress, mendable():
        costs = layer_costs(model, ids, measured, batch_size=o.batch_size, progress=progress("measuring"))
        found = share_out(costs, measured, good, o.least, o.most)
    return {"layer_shares": found, "measured_at": measured, "kl": costs.tolist()}


def _made_by(made_of: dict) -> dict:
    """What it takes to repeat the measurement."""
    from .provenance import environment

    command = shlex.join(["trimkv", *click.get_current_context().obj.arguments])
    return {"command": command, "environment": environment(), "made_of": made_of}


def _save(gates, result: dict, o: SimpleNamespace) -> None:
    """The gates with their shares, and the measurement beside them."""
    from ..gates.files import save_gates

    with mendable((ValueError, OSError), doing=f"--output {o.output}"):
        found = {"layer_shares": result["layer_shares"], "layer_shares_made_of": result["made_of"]}
        save_gates(gates, o.output, overwrite=True, **found)  # _finished has looked
        outputs.write(Path(o.output) / SHARES, result)


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
