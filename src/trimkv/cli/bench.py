"""``trimkv bench``: what a step costs, beside what the hardware needs at least."""

import json
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import click

from ..bench.shapes import SHAPES
from . import bench_kinds, loading, outputs, show
from .errors import UserError, mendable
from .options import DTYPES, all_of, numbers, output_options, overwrite_option
from .partial import part_of


class Kinds(click.Group):
    """The kinds of measurement, as commands."""

    def resolve_command(self, context, arguments):
        if arguments[0] not in self.commands:
            raise UserError(f"bench {arguments[0]}: say what to measure, one of {', '.join(self.commands)}")
        return super().resolve_command(context, arguments)


figure_option = click.option(
    "--figure", metavar="FILE", help="Draw tokens/s and memory into a .png, .svg or .pdf file."
)


@click.group(
    cls=Kinds, invoke_without_command=True, short_help="Measure speed and memory, side by side with stock transformers."
)
@click.option("--from", "source", metavar="FILE.json", help="Show or draw a saved result; nothing is measured.")
@figure_option
@overwrite_option
@output_options
@click.pass_context
def bench(context: click.Context, **options):
    """Measure decode steps, prompts, attention alone, or training steps, on random weights of a known model's sizes.

    Each kind has its own options: trimkv bench decode --help. Systems are measured side by side in one run, after their
    results were compared: what is wrong gets no number.

    The floor of a step is the least time that this device can take for it: the time to move the bytes that it must
    read, at the bandwidth of a large copy, or to do its arithmetic, at the rate of a large matrix product. Both are
    measured in the same run. "80 % of the floor" means that a step takes the floor's time divided by 0.8.
    """
    o = SimpleNamespace(**options)
    if context.invoked_subcommand:
        if o.source or o.figure or o.overwrite:
            raise UserError(f"options go behind the kind: trimkv bench {context.invoked_subcommand} ...")
        context.obj.as_json = o.as_json
        return
    if not o.source:
        raise UserError(f"say what to measure: one of {', '.join(bench.commands)} (or --from FILE.json)")
    outputs.check_figure(o.figure, o.overwrite)
    result = _saved(o.source)
    outputs.check_drawn(o.figure, result, o.overwrite)
    _show(result, o, rows=True)


def _options(kind: str, *own: str):
    """The options of one kind: those that it has to itself, and what all have."""
    systems = bench_kinds.SYSTEMS[kind]
    few = kind == "train"
    known = {
        "context": click.option(
            "--context", default="2048", show_default=True, help="Tokens, several numbers with commas between."
        ),
        "unused_context": click.option("--context", help="Not used: a step attends to --budget slots."),
        "budget": click.option(
            "--budget",
            default="256",
            show_default=True,
            help="M of the capacity loss, smaller than every --context." if few else "Slots per layer and KV head.",
        ),
        "budgets": click.option(
            "--budget", default="256", show_default=True, help="Slots per KV head, several numbers with commas between."
        ),
        "chunk": click.option(
            "--chunk",
            type=click.IntRange(min=1),
            default=4096,
            show_default=True,
            help="Tokens of the prompt per forward pass of our own systems.",
        ),
        "steps": click.option(
            "--steps",
            type=click.IntRange(min=1),
            default=32,
            show_default=True,
            help="Optimizer steps, of which the first three are not counted." if few else "Decode steps of one timing.",
        ),
        "compile": click.option(
            "--compile/--no-compile",
            default=None,
            help="torch.compile for the small parts of our own steps.  [default: on a GPU]",
        ),
        "fused": click.option(
            "--fused/--no-fused", default=None, help="Fuse whole layers in system trimkv.  [default: on a GPU]"
        ),
    }
    return all_of(
        click.option(
            "--shape",
            type=click.Choice(list(SHAPES)),
            default="smollm2",
            show_default=True,
            metavar="NAME",
            help=f"Sizes of a known model: {', '.join(SHAPES)}. The weights are random.",
        ),
        click.option("--batch", default="1", show_default=True, help="Rows, several numbers with commas between."),
        *(known[name] for name in own),
        click.option(
            "--compare",
            metavar="NAME,...",
            help=f"Systems, of {', '.join(systems)}.  [default: {next(iter(systems)) if few else 'all'}]",
        ),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True),
        click.option(
            "--output",
            metavar="FILE.json",
            help="Write the JSON to a file; until all is measured it grows in FILE.json.part. A finished file is "
            "shown, not measured again.",
        ),
        figure_option,
        overwrite_option,
        output_options,
    )


@bench.command(epilog=bench_kinds.epilog("decode"))
@_options("decode", "context", "budget", "steps", "compile", "fused")
def decode(**options):
    """Measure a decode step: one new token for each row, with --context tokens behind it.

    The floor is the time to move the weights and the held keys and values once. With a full cache these grow with the
    context; with slots they are those of --budget tokens, whatever the context.
    """
    _run("decode", options)


@bench.command(epilog=bench_kinds.epilog("prefill"))
@_options("prefill", "context", "budget", "chunk")
def prefill(**options):
    """Measure reading a prompt of --context tokens, and the memory at its worst.

    The floor is the time of the arithmetic of one pass over the prompt.
    """
    _run("prefill", options)


@bench.command(epilog=bench_kinds.epilog("attention"))
@_options("attention", "unused_context", "budgets")
def attention(**options):
    """Measure the attention of one layer at a decode step alone: no model around it.

    The floor is the time to move the slots' keys and values once.
    """
    if options.pop("context") is not None:
        loading.note("--context is not used by bench attention: a step attends to --budget slots")
    _run("attention", options)


@bench.command(epilog=bench_kinds.epilog("train"))
@_options("train", "context", "budget", "steps")
def train(**options):
    """Measure optimizer steps of gate training (first stage) on --batch samples of --context random tokens.

    The floor is the time of three products with every weight: of the full model, of the model with gates, and of its
    backward pass.
    """
    _run("train", options)


def _run(what: str, options: dict) -> None:
    o = SimpleNamespace(what=what, source=None, **options)
    o.as_json = o.as_json or getattr(click.get_current_context().obj, "as_json", False)
    outputs.check_figure(o.figure, o.overwrite)
    o.contexts = numbers(o, "context") if hasattr(o, "context") else ()
    o.batches, o.budgets = numbers(o, "batch"), numbers(o, "budget")
    if len(o.budgets) > 1 and what != "attention":
        raise UserError(f"--budget {o.budget}: one number, please; several are for attention")
    o.systems = bench_kinds.systems(what, o.compare)
    outputs.check_file("--output", o.output)
    loading.import_torch()
    bench_kinds.check(o)
    import torch

    from .provenance import environment

    o.place = torch.device(loading.pick_device(o.device))
    o.tensor_type = getattr(torch, loading.pick_dtype(o.dtype, o.place.type))
    o.environment = environment()
    made_of = _made_of(o)
    result = outputs.finished("--output", o.output, made_of, o.overwrite)
    outputs.check_drawn(o.figure, {"made_of": made_of}, o.overwrite)
    if result is not None:
        loading.note(f"{o.output} holds this measurement, finished: nothing is measured (--overwrite measures anew)")
        _show(result, o, rows=True)
        return
    _check_part(o, made_of)
    _show(_measure(o, made_of), o)


def _made_of(o: SimpleNamespace) -> dict:
    """All that the numbers depend on."""
    own = {name: getattr(o, name) for name in ("chunk", "steps", "compile", "fused") if hasattr(o, name)}
    for name in ("compile", "fused"):
        if name in own and own[name] is None:
            own[name] = o.place.type == "cuda"
    return {
        "command": f"bench {o.what}",
        "shape": o.shape,
        **({"context": list(o.contexts)} if o.contexts else {}),
        "batch": list(o.batches),
        "budget": list(o.budgets),
        "systems": list(o.systems),
        **own,
        "dtype": str(o.tensor_type).removeprefix("torch."),
        "device": o.environment["gpu"] if o.place.type == "cuda" else o.environment["cpu"],
        "threads": o.environment["threads"],
        "versions": {name: o.environment[name] for name in ("python", "torch", "transformers", "trimkv")},
        "commit": o.environment["commit"],
    }


def _check_part(o: SimpleNamespace, made_of: dict) -> None:
    """What a measurement that was killed left: of the same it is begun anew, of another it is not touched."""
    if not o.output or o.overwrite or not part_of(o.output).exists():
        return
    outputs.finished("--output", part_of(o.output), made_of, overwrite=False)
    loading.note(f"{part_of(o.output)} was not finished: measured anew")


def _measure(o: SimpleNamespace, made_of: dict) -> dict:
    from ..bench.measure import copy_bandwidth, matmul_rate

    bandwidth, matmul = copy_bandwidth(o.place), matmul_rate(o.place, o.tensor_type)
    result = {
        "rows": [],
        "what": o.what,
        **{name: made_of[name] for name in ("shape", "dtype", "device")},
        "copy_bandwidth": bandwidth,
        "matmul_rate": matmul,
        **{name: made_of[name] for name in ("versions", "commit", "threads")},
        "date": o.environment["date"],
        "command": f"trimkv {shlex.join(click.get_current_context().obj.arguments)}",
        "made_of": made_of,
    }
    start, say, good = time.perf_counter(), loading.note if o.as_json else click.echo, False
    for row in bench_kinds.rows(o, made_of, bandwidth, matmul):
        result["rows"].append(row)
        result["seconds"] = round(time.perf_counter() - start, 1)
        shown = [row] if good else result["rows"]  # nothing is shown or written before one system gave a number
        good = good or row["ms"] is not None
        if not good:
            continue
        for one in shown:
            say(_line(one))
        if o.output:
            outputs.write(part_of(o.output), result)
    if not good:
        _refuse(result["rows"])
    if o.output:
        outputs.write(Path(o.output), result)
        part_of(o.output).unlink(missing_ok=True)
    return result


def _refuse(rows: list[dict]) -> None:
    """No system gave a number: says why, with exit code 2 if the person at the keyboard can mend all of it."""
    reasons = list(dict.fromkeys(f"{row['system']}: {row['error']}" for row in rows))
    error = UserError(f"no system could be measured: {'; '.join(reasons[:2])}")
    if not all(row.get("mendable") for row in rows):
        error.exit_code = 1
    raise error


def _saved(path: str) -> dict:
    with mendable((OSError, ValueError), doing=f"--from {path}"):
        result = json.loads(Path(path).read_text())
    if not isinstance(result, dict) or "copy_bandwidth" not in result:
        raise UserError(f"--from {path}: not a result of trimkv bench")
    return result


def _show(result: dict, o: SimpleNamespace, rows: bool = False) -> None:
    """The result; with its ``rows`` if they were not shown as they came."""
    if o.as_json:
        show.emit(result)
    else:
        for row in result["rows"] if rows else ():
            click.echo(_line(row))
        rate = f"copy {result['copy_bandwidth'] / 1e9:,.0f} GB/s, matmul {result['matmul_rate'] / 1e12:,.1f} TFLOP/s"
        click.echo(f"{result['shape']} {result['dtype']} on {result['device']}: {rate}")
        click.echo(show.faint("the floor is the least time that these rates allow for a step"))
    if o.figure:
        from ..viz.bench import draw

        with mendable((ValueError, OSError), doing=f"--figure {o.figure}"):
            draw(result, o.figure, outputs.mark(result))


def _line(row: dict) -> str:
    """``trimkv         4 x 32,786   1.93 ms   2,072 tokens/s   82 % of the floor   9.1 GB``"""
    where = f"{row['system']:<20} {row['batch']:>3} x {row['context']:<9,}"
    if row["ms"] is None:
        return f"{where} {row['error']}"
    return (
        f"{where} {row['ms']:>10.3f} ms {row['tokens_per_second']:>12,.1f} tokens/s "
        f"{100 * row['fraction_of_floor']:>6.1f} % of the floor {show.bytes_text(row['peak_bytes']):>9}"
    )
