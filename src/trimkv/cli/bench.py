"""``trimkv bench``: what a step costs, beside what the hardware needs at least."""

import importlib
import importlib.util
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click

from . import loading, show
from .compare import _check_figure, _check_output
from .errors import UserError, mendable
from .options import DTYPES, numbers, output_options

WHAT = ("decode", "prefill", "attention", "train")


@click.command(short_help="Measure speed and memory, side by side with stock transformers.")
@click.argument("what", type=click.Choice(WHAT), required=False)
@click.option("--shape", default="smollm2", show_default=True, help="Sizes of a known model; its weights are random.")
@click.option("--context", default="2048", show_default=True, help="Tokens, several with commas between.")
@click.option("--batch", default="1", show_default=True, help="Rows, several with commas between.")
@click.option("--budget", default="256", show_default=True, help="Slots per layer and KV head; several for attention.")
@click.option("--compare", help="Systems, with commas between.  [default: all, and plain for train]")
@click.option("--chunk", type=click.IntRange(min=1), default=4096, show_default=True, help="Of prefill.")
@click.option("--steps", type=click.IntRange(min=1), default=32, show_default=True, help="Of one timing.")
@click.option("--compile/--no-compile", default=None, help="Our own decode steps.  [default: on a GPU]")
@click.option("--fused/--no-fused", default=None, help="Whole layers in our decode steps.  [default: on a GPU]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--output", metavar="FILE.json", help="Write the JSON to a file as it grows.")
@click.option("--figure", metavar="FILE", help="Draw tokens/s and memory into a .png, .svg or .pdf file.")
@click.option("--from", "source", metavar="FILE.json", help="Show or draw a saved result; nothing is measured.")
@output_options
def bench(**options):
    """Measure decode steps, prompts, attention alone, or training steps.

    Systems are measured side by side in one run, after their results were compared: what is wrong gets no number.
    floor_ms is what the bytes or the arithmetic of a step take at least, by the bandwidth of a copy and the rate of a
    matrix product on the same device.
    """
    o = SimpleNamespace(**options)
    _check_figure(o.figure)
    if o.source:
        _show(_saved(o.source), o)
        return
    if o.what is None:
        raise UserError(f"say what to measure: one of {', '.join(WHAT)}")
    o.contexts, o.batches, o.budgets = (numbers(o, name) for name in ("context", "batch", "budget"))
    if len(o.budgets) > 1 and o.what != "attention":
        raise UserError(f"--budget {o.budget}: one number, please; several are for attention")
    _check_output(o.output)
    loading.import_torch()
    _show(_measure(o), o)


def _measure(o: SimpleNamespace) -> dict:
    import torch

    from ..bench.measure import copy_bandwidth, matmul_rate
    from ..bench.models import config_of
    from .provenance import environment

    with mendable():
        config_of(o.shape)
    o.systems = _systems(o)
    where = torch.device(loading.pick_device(o.device))
    dtype = getattr(torch, loading.pick_dtype(o.dtype, where.type))
    found = environment()
    bandwidth, matmul = copy_bandwidth(where), matmul_rate(where, dtype)
    result = {
        "rows": [],
        "what": o.what,
        "shape": o.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "device": found["gpu"] if where.type == "cuda" else found["cpu"],
        "copy_bandwidth": bandwidth,
        "matmul_rate": matmul,
        "versions": {name: found[name] for name in ("python", "torch", "transformers", "trimkv")},
        "commit": found["commit"],
        "date": found["date"],
        "threads": found["threads"],
        "command": f"trimkv {shlex.join(click.get_current_context().obj.arguments)}",
    }
    start, say = time.perf_counter(), loading.note if o.as_json else click.echo
    for row in _rows(o, where, dtype, bandwidth, matmul):
        result["rows"].append(row)
        result["seconds"] = round(time.perf_counter() - start, 1)
        say(_line(row))
        if o.output:
            with mendable(OSError, doing=f"--output {o.output}"):
                Path(o.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _rows(o: SimpleNamespace, where, dtype, bandwidth: float, matmul: float) -> Iterator[dict]:
    from ..bench import attention, decode, models, prefill

    contexts, batches, systems = o.contexts, o.batches, o.systems
    if o.what == "attention":
        given = attention.Options(o.shape, batches, o.budgets, systems)
        yield from attention.measure(given, where, dtype, bandwidth)
        return
    if o.what == "train":
        from ..bench import train

        given = train.Options(o.shape, contexts, batches, o.budgets[0], systems, o.steps)
        yield from train.measure(given, where, dtype, matmul)
        return
    model = models.build(o.shape, str(where), dtype)
    if o.what == "prefill":
        given = prefill.Options(contexts, batches, o.budgets[0], o.chunk, systems)
        yield from prefill.measure(model, given, matmul)
    else:
        compile = where.type == "cuda" if o.compile is None else o.compile
        fused = where.type == "cuda" if o.fused is None else o.fused
        given = decode.Options(contexts, batches, o.budgets[0], systems, o.steps, compile=compile, fused=fused)
        yield from decode.measure(model, given, bandwidth)


def _systems(o: SimpleNamespace) -> tuple[str, ...]:
    if o.what == "train":
        if importlib.util.find_spec("accelerate") is None:
            raise UserError("measuring training needs accelerate: pip install 'trimkv[train]'")
    known = tuple(importlib.import_module(f"..bench.{o.what}", __package__).SYSTEMS)
    if not o.compare:
        return known[:1] if o.what == "train" else known
    names = tuple(dict.fromkeys(name.strip() for name in o.compare.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise UserError(f"--compare {name}: systems of bench {o.what} are {', '.join(known)}")
    if not names:
        raise UserError(f"--compare: name one of {', '.join(known)}")
    return names


def _saved(path: str) -> dict:
    with mendable((OSError, ValueError), doing=f"--from {path}"):
        result = json.loads(Path(path).read_text())
    if not isinstance(result, dict) or "copy_bandwidth" not in result:
        raise UserError(f"--from {path}: not a result of trimkv bench")
    return result


def _show(result: dict, o: SimpleNamespace) -> None:
    if o.as_json:
        show.emit(result)
    else:
        for row in result["rows"] if o.source else ():  # else they were shown as they came
            click.echo(_line(row))
        rate = f"copy {result['copy_bandwidth'] / 1e9:,.0f} GB/s, matmul {result['matmul_rate'] / 1e12:,.1f} TFLOP/s"
        click.echo(f"{result['shape']} {result['dtype']} on {result['device']}: {rate}")
    if o.figure:
        from ..viz.bench import draw

        with mendable((ValueError, OSError), doing=f"--figure {o.figure}"):
            draw(result, o.figure)


def _line(row: dict) -> str:
    """``trimkv         4 x 32,786   1.93 ms   2,072 tokens/s   82 % of the floor   9.1 GB``"""
    where = f"{row['system']:<20} {row['batch']:>3} x {row['context']:<9,}"
    if row["ms"] is None:
        return f"{where} {row['error']}"
    return (
        f"{where} {row['ms']:>10.3f} ms {row['tokens_per_second']:>12,.1f} tokens/s "
        f"{100 * row['fraction_of_floor']:>6.1f} % of the floor {show.bytes_text(row['peak_bytes']):>9}"
    )
