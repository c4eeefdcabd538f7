"""``trimkv train``: retention gates for a model, from your text."""

import contextlib
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import click

from . import loading, show
from .compare import _check_texts
from .errors import UserError, mendable
from .options import model_options, output_options

LOSSES = ("kl", "ntp", "reverse_kl")
REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # name -> packages, one of them


@click.command(short_help="Train retention gates for a model.")
@click.option("--data", multiple=True, metavar="FILE...", help="A .txt or .jsonl file, also .gz, or a hub dataset id.")
@click.argument("more_data", nargs=-1, metavar="")
@click.option("--output", required=True, metavar="DIR", help="Where gates.safetensors and gates.json go.")
@click.option("--budget", type=click.FloatRange(min=1), default=32, show_default=True, help="M of the capacity loss.")
@click.option("--context", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens per sample.")
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--accumulation", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--stage",
    type=click.Choice(["decay", "eviction"]),
    default="decay",
    show_default=True,
    help="eviction is a second stage for gates from the first: give them with --gates.",
)
@click.option("--losses", default="kl", show_default=True, help=f"Of {', '.join(LOSSES)}, with commas between.")
@click.option("--capacity-weight", type=click.FloatRange(min=0), default=4.0, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=3e-3, show_default=True)
@click.option("--bias-learning-rate", type=click.FloatRange(min=0, min_open=True), default=5e-2, show_default=True)
@click.option("--kind", type=click.Choice(["rg", "rg2", "rg3"]), default="rg", show_default=True)
@click.option("--intermediate-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--no-borders", is_flag=True, help="Records follow one another in one context instead of being apart.")
@click.option("--response-only", is_flag=True, help="Of chats, learn the assistant's responses only.")
@click.option(
    "--save-steps", type=click.IntRange(min=0), default=0, show_default=True, help="Checkpoint every N steps."
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output.")
@click.option("--report-to", metavar="NAME,...", help=f"Where curves go, too: {', '.join(REPORTERS)}.")
@model_options
@output_options
def train(**options):
    """Train retention gates; the model itself stays as it is.

    The gates learn to keep the model's predictions while attention decays as they say (stage decay), or while the
    least retained tokens are evicted (stage eviction). Several GPUs: torchrun --nproc-per-node N -m trimkv train ...
    """
    from ..train import processes

    o = SimpleNamespace(**options)
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("training needs accelerate: pip install 'trimkv[train]'")
    with _silence() if processes.number() else contextlib.nullcontext():
        result = _run(o)
        processes.leave()
    if processes.number():
        return
    result.pop("history")
    if o.as_json:
        show.emit(result)
    else:
        click.echo(f"{result['steps']} steps, {result['tokens']:,} tokens in {result['seconds']:.0f} s")
        kl = "" if result["final_kl"] is None else f"KL {result['final_kl']:.4f}, "
        click.echo(f"{kl}retained {result['final_occupancy']:.2f} x the budget -> {result['output']}")


def _run(o: SimpleNamespace) -> dict:
    from ..train import processes

    data = [*o.data, *o.more_data]
    files = [name for name in data if Path(name).suffix in (".txt", ".jsonl", ".gz")]
    if not data:
        raise UserError("no data: give --data FILE")
    if files:
        _check_texts(files)
    _check_folder(Path(o.output))
    if o.resume and not any(Path(o.output).glob("checkpoint-*")):
        raise UserError(f"--resume: no checkpoint to resume from in {o.output}")
    reporters = _reporters(o.report_to)
    loading.check_model_name(o.model)
    loading.import_torch()
    start = _first_gates(o)
    with mendable():
        config = _config(o, reporters)
    device = loading.pick_device(o.device)
    if device == "cuda":
        with mendable():
            processes.take_gpu()
    dtype = loading.pick_dtype(o.dtype, device)
    tokenizer = loading.load_tokenizer(o.model)
    model = loading.load_model(o.model, device, dtype)
    return _train(model, tokenizer, config, start, data, o)


@contextlib.contextmanager
def _silence():
    """Processes but the first say nothing, unless they fail."""
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: a file, but gates need a folder")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--output {folder}: cannot be written there")


def _reporters(text: str | None) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    for name in names:
        if name not in REPORTERS:
            raise UserError(f"--report-to {name}: known are {', '.join(REPORTERS)}")
        if not any(importlib.util.find_spec(package) for package in REPORTERS[name]):
            raise UserError(f"--report-to {name} needs a package: pip install {REPORTERS[name][0]}")
    return names


def _first_gates(o: SimpleNamespace):
    from ..gates.files import bundled, load_gates

    if o.gates in ("bundled", "none"):
        if o.stage == "eviction" and o.gates == "bundled" and o.model in bundled():
            return load_gates(bundled()[o.model])
        if o.stage == "eviction":
            raise UserError("--stage eviction goes on from gates of the first stage: name them with --gates DIR")
        return None
    with mendable():
        return load_gates(Path(o.gates).expanduser() if Path(o.gates).expanduser().exists() else o.gates)


def _config(o: SimpleNamespace, reporters: tuple[str, ...]):
    from ..train.config import GateConfig

    losses = tuple(name.strip() for name in o.losses.split(",") if name.strip())
    if not losses or any(name not in LOSSES for name in losses):
        raise UserError(f"--losses {o.losses}: known losses are {', '.join(LOSSES)}")
    names = ("budget", "context", "steps", "batch_size", "accumulation", "stage", "capacity_weight", "learning_rate")
    names += ("bias_learning_rate", "kind", "intermediate_size", "seed", "save_steps")
    return GateConfig(losses=losses, report_to=reporters, **{name: getattr(o, name) for name in names})


def _train(model, tokenizer, config, gates, data: list[str], o: SimpleNamespace) -> dict:
    from ..train import processes
    from ..train.data import PackedTexts, Source
    from ..train.trainer import SaveError
    from ..train.trainer import train as run

    dataset = PackedTexts(
        [Source(name, borders=not o.no_borders) for name in data],
        tokenizer,
        config.context,
        seed=config.seed,
        response_only=o.response_only,
        samples=config.steps * config.batch_size * config.accumulation * processes.count(),
    )
    with loading.quiet(), mendable((ValueError, SaveError)):
        with loading.status("reading the data"):
            dataset[0]
        meta = {"data": ", ".join(Path(name).name for name in data), "base_model": o.model}
        with _bar(config.steps) as callbacks:
            return run(model, dataset, config, o.output, gates, o.resume, meta, callbacks)


@contextlib.contextmanager
def _bar(steps: int):
    """A live line on stderr: KL, capacity, retained mass over budget, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import TrainerCallback

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=steps)

        class Bar(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                if logs and "capacity" in logs:
                    kl = f"KL {logs['kl']:.4f}  " if "kl" in logs else ""
                    text = f"{kl}capacity {logs['capacity']:.4f}  retained/budget {logs['occupancy']:.2f}"
                    progress.update(task, completed=state.global_step, description=text)

        yield [Bar()]
