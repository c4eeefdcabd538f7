"""``trimkv compare``: what a policy costs in quality, on your text."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click

from . import loading, show
from .errors import UserError, mendable
from .options import model_options, output_options


@click.command(short_help="Measure what policies cost in quality on your text.")
@click.option("--text", "texts", multiple=True, metavar="FILE...", help="A .txt or .jsonl file, also .gz.")
@click.argument("more_texts", nargs=-1, metavar="")
@click.option("--context", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens per sequence.")
@click.option("--policies", help="Names with commas between.  [default: trimkv where there are gates; streaming_llm]")
@click.option("--budgets", default="64,128", show_default=True, help="Tokens per head, with commas between.")
@click.option("--max-sequences", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences that advance together."
)
@click.option("--stepwise", is_flag=True, help="Feed token by token even where one pass gives the same. Slow.")
@click.option("--output", metavar="FILE.json", help="Write the JSON to a file, with command, machine and versions.")
@model_options
@output_options
def compare(**options):
    """Compare policies with the full cache on your text, evicting at every token.

    Every sequence is read by the full model and by each policy at each budget; a token is evicted at every step, so the
    budget is never exceeded. Reported are KL(full || policy) in nats, perplexity and how often the most probable token
    is the same.
    """
    o = SimpleNamespace(**options)
    policies, budgets = _names(o.policies), _budgets(o.budgets)
    paths = [*o.texts, *o.more_texts]
    _check_texts(paths)
    _check_output(o.output)
    loading.check_model_name(o.model)
    loading.import_torch()
    choice = loading.choose(policies, o.model, o.gates, several=True)
    for budget in budgets:
        loading.check_budget(budget, choice.policies)
    device = loading.pick_device(o.device)
    tokenizer = loading.load_tokenizer(o.model)
    ids = _windows(paths, tokenizer, o)
    dtype = loading.pick_dtype(o.dtype, device)
    model = loading.load_model(o.model, device, dtype, choice.gates, choice.heads)
    if choice.remark:
        loading.note(choice.remark)
    result = _compare(model, ids, choice.policies, budgets, o)
    if o.output:
        _write(Path(o.output), {**_made_by(device, dtype), **result})
    if o.as_json:
        show.emit(result)
    else:
        _print(result)


def _compare(model, ids, policies, budgets, o: SimpleNamespace) -> dict:
    from .. import bounded_cache
    from ..cache.policies import make
    from ..eval.compare import compare as run

    chosen = [make(name, seed=o.seed) if name == "random" else make(name) for name in policies]
    with mendable():  # a model that cannot be served from slots says so here, not within the measurement
        for policy in chosen:
            bounded_cache(model, policy, budgets[0])
    with loading.quiet(), _progress() as progress:
        options = {"batch_size": o.batch_size, "progress": progress, "name": o.model, "stepwise": o.stepwise}
        return run(model, ids, chosen, budgets, **options).as_dict()


def _names(text: str | None) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    if text is not None and not names:
        raise UserError("--policies is empty")
    return tuple(dict.fromkeys(names))


def _budgets(text: str) -> list:
    from ..budget import Budget

    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--budgets {text}: expected whole numbers with commas between, such as 64,128") from None
    if not numbers:
        raise UserError("--budgets is empty")
    with mendable():
        return [Budget(number) for number in dict.fromkeys(numbers)]


def _check_texts(paths: list[str]) -> None:
    """Looks at the first record of each file: cheaper than finding out after the model was loaded."""
    from ..texts import read_texts

    if not paths:
        raise UserError("no text: give --text FILE")
    with mendable():
        for path in paths:
            next(read_texts([path]))


def _windows(paths: list[str], tokenizer, o: SimpleNamespace):
    import torch

    from ..texts import file_windows

    with loading.quiet(), loading.status("reading the texts"), mendable():
        windows = list(file_windows(paths, tokenizer, o.context, o.max_sequences))
    if not windows:
        raise UserError(f"the texts are shorter than one sequence of {o.context} tokens: give more, or lower --context")
    if len(windows) < o.max_sequences:
        loading.note(f"the texts give {len(windows)} of {o.max_sequences} sequences of {o.context} tokens")
    return torch.tensor(windows)


def _check_output(output: str | None) -> None:
    if output is None:
        return
    path = Path(output)
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"--output {output}: cannot be written there")


def _made_by(device: str, dtype: str) -> dict:
    """What it takes to repeat and to judge the numbers."""
    from .provenance import environment

    command = shlex.join(["trimkv", *click.get_current_context().obj.arguments])
    return {"command": command, "environment": environment(), "device": device, "dtype": dtype}


def _write(path: Path, result: dict) -> None:
    half = path.with_name(path.name + ".part")
    with mendable(OSError, doing=f"--output {path}"):
        half.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        half.replace(path)


def _progress():
    """A bar with the time left on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    class Bar(Progress):
        def __enter__(self) -> Callable[[int, int], None]:
            super().__enter__()
            task = self.add_task("", total=None)
            return lambda done, total: self.update(task, completed=done, total=total)

    columns = (TextColumn("comparing"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("left"))
    console = Console(stderr=True)
    return Bar(*columns, console=console, disable=not console.is_terminal)


def _print(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{result['model']}: {result['sequences']} sequences of {result['context']:,} tokens",
        caption=f"perplexity with the full cache: {result['full_perplexity']:.3f}",
    )
    table.add_column("policy")
    for heading in ("budget", "KL (nats)", "perplexity", "same top-1", "peak tokens"):
        table.add_column(heading, justify="right")
    seen = set()
    for row in result["rows"]:
        unbounded = row["policy"] == "full"
        if unbounded and "full" in seen:
            continue
        seen.add(row["policy"])
        table.add_row(
            row["policy"],
            "all" if unbounded else f"{row['budget']:,}",
            f"{row['kl']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['peak_tokens_per_head']:,}",
        )
    Console().print(table)
