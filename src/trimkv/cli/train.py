"""``trimkv train``: retention gates for a model, from your text."""

import contextlib
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import click
from click.core import ParameterSource

from . import loading, reading, show
from .errors import UserError, mendable
from .options import model_options, output_options

LOSSES = ("kl", "ntp", "reverse_kl")
HEADS = ("locret", "seer_attention_r")  # baselines with trained heads
FOR_GATES = ("budget", "stage", "losses", "capacity_weight", "bias_learning_rate", "kind", "intermediate_size")
FOR_GATES += ("average_losses", "response_only", "fast")
FOR_HEADS = {"width": HEADS, "block_size": HEADS[1:]}  # option -> methods that have it
SHOWN = ("kl", "capacity", "regression", "smoothness", "distillation")  # losses, on the live line and at the end
REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # name -> packages, one of them


@click.command(short_help="Train retention gates for a model, or a baseline's heads.")
@click.option("--data", multiple=True, metavar="FILE...", help="A .txt or .jsonl file, also .gz, or a hub dataset id.")
@click.argument("more_data", nargs=-1, metavar="")
@click.option("--output", required=True, metavar="DIR", help="Where gates.safetensors and gates.json go.")
@click.option(
    "--method",
    type=click.Choice(["trimkv", *HEADS]),
    default="trimkv",
    show_default=True,
    help="What is trained. The heads of the baselines take their published settings where an option is left out, "
    "whatever default is shown here.",
)
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
@click.option(
    "--average-losses", is_flag=True, help="Take the mean of several losses instead of their sum, as the authors' code."
)
@click.option("--capacity-weight", type=click.FloatRange(min=0), default=4.0, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=3e-3, show_default=True)
@click.option("--bias-learning-rate", type=click.FloatRange(min=0, min_open=True), default=5e-2, show_default=True)
@click.option("--kind", type=click.Choice(["rg", "rg2", "rg3"]), default="rg", show_default=True)
@click.option("--intermediate-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--width", type=click.IntRange(min=1), help="Of a baseline's heads.  [default: as published]")
@click.option("--block-size", type=click.IntRange(min=1), help="Of seer_attention_r.  [default: as published]")
@click.option("--no-borders", is_flag=True, help="Records follow one another in one context instead of being apart.")
@click.option("--response-only", is_flag=True, help="Of chats, learn the assistant's responses only.")
@click.option(
    "--save-steps", type=click.IntRange(min=0), default=0, show_default=True, help="Checkpoint every N steps."
)
@click.option(
    "--fast",
    is_flag=True,
    help="For small models on a GPU: compiled layers, the step as a CUDA graph, no checkpointing. A minute's wait, "
    "then up to four times the speed for a few GB.",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output.")
@click.option("--report-to", metavar="NAME,...", help=f"Where curves go, too: {', '.join(REPORTERS)}.")
@model_options
@output_options
def train(**options):
    """Train retention gates; the model itself stays as it is.

    The gates learn to keep the model's predictions while attention decays as they say (stage decay), or while the
    least retained tokens are evicted (stage eviction). --method locret or seer_attention_r trains the heads of that
    baseline on the same data instead. Several GPUs: torchrun --nproc-per-node N -m trimkv train ...
    """
    from ..train import processes

    o = SimpleNamespace(**options)
    o.given = _given(options)
    _check_method(o)
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
        losses = {name: result.get(f"final_{name}") for name in SHOWN}
        said = [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
        if o.method == "trimkv":
            said.append(f"retained {result['final_occupancy']:.2f} x the budget")
        click.echo(f"{', '.join(said)} -> {result['output']}")


def _run(o: SimpleNamespace) -> dict:
    from ..train import processes

    data = [*o.data, *o.more_data]
    files = [name for name in data if Path(name).suffix in (".txt", ".jsonl", ".gz")]
    if not data:
        raise UserError("no data: give --data FILE")
    if files:
        reading.check(files)
    loading.check_folder(Path(o.output))
    if o.resume and not any(Path(o.output).glob("checkpoint-*")):
        raise UserError(f"--resume: no checkpoint to resume from in {o.output}")
    reporters = _reporters(o.report_to)
    loading.check_model_name(o.model)
    loading.import_torch()
    start = _first_gates(o) if o.method == "trimkv" else _first_heads(o)
    with mendable():
        config = _config(o, reporters) if o.method == "trimkv" else _head_config(o, reporters)
    device = loading.pick_device(o.device)
    if device == "cuda":
        with mendable():
            processes.take_gpu()
    if o.fast and not str(device).startswith("cuda"):
        raise UserError("--fast is for a GPU: leave it out, or name one with --device cuda")
    dtype = loading.pick_dtype(o.dtype, device)
    tokenizer = loading.load_tokenizer(o.model)
    model = loading.load_model(o.model, device, dtype)
    return _train(model, tokenizer, config, start, data, o)


def _given(options: dict) -> set[str]:
    """The options that were typed, and not left at their defaults."""
    source = click.get_current_context().get_parameter_source
    return {name for name in options if source(name) is not ParameterSource.DEFAULT}


def _check_method(o: SimpleNamespace) -> None:
    wrong = [name for name in FOR_GATES if name in o.given] if o.method != "trimkv" else []
    wrong += [name for name, methods in FOR_HEADS.items() if name in o.given and o.method not in methods]
    if wrong:
        raise UserError(f"--{wrong[0].replace('_', '-')} means nothing to --method {o.method}: leave it out")


@contextlib.contextmanager
def _silence():
    """Processes but the first say nothing, unless they fail."""
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


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


def _first_heads(o: SimpleNamespace):
    from ..gates.head_sets import load_heads

    if "gates" not in o.given or o.gates in ("bundled", "none"):
        return None
    with mendable():
        heads = load_heads(Path(o.gates).expanduser())
        if heads.kind != o.method:
            raise ValueError(f"--gates {o.gates}: heads of {heads.kind}, and the training is of {o.method}")
    return heads


def _config(o: SimpleNamespace, reporters: tuple[str, ...]):
    from ..train.config import GateConfig

    losses = tuple(name.strip() for name in o.losses.split(",") if name.strip())
    if not losses or any(name not in LOSSES for name in losses):
        raise UserError(f"--losses {o.losses}: known losses are {', '.join(LOSSES)}")
    names = ("budget", "context", "steps", "batch_size", "accumulation", "stage", "capacity_weight", "learning_rate")
    names += ("bias_learning_rate", "kind", "intermediate_size", "seed", "save_steps", "average_losses")
    how = {"checkpointing": False, "cuda_graph": True, "compile": True} if o.fast else {}
    return GateConfig(losses=losses, report_to=reporters, **how, **{name: getattr(o, name) for name in names})


def _head_config(o: SimpleNamespace, reporters: tuple[str, ...]):
    """The published settings and what was typed. The warm-up keeps its share of the steps."""
    from ..train.heads import HeadConfig

    published = getattr(HeadConfig, o.method)
    names = ("context", "steps", "batch_size", "accumulation", "learning_rate", "width", "block_size", "seed")
    typed = {name: getattr(o, name) for name in (*names, "save_steps") if name in o.given}
    if "steps" in typed:
        typed["warmup_steps"] = published().warmup_steps * o.steps // published().steps
    return published(report_to=reporters, **typed)


def _train(model, tokenizer, config, start, data: list[str], o: SimpleNamespace) -> dict:
    from ..train import processes
    from ..train.data import PackedTexts, Source
    from ..train.trainer import SaveError

    if o.method == "trimkv":
        from ..train.trainer import train as run
    else:
        from ..train.heads import train_heads as run
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
            result = run(model, dataset, config, o.output, start, o.resume, meta, callbacks)
    return {"method": o.method, "final_kl": None, "final_capacity": None, **result}


@contextlib.contextmanager
def _bar(steps: int):
    """A live line on stderr: losses, for gates the retained mass over budget, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import TrainerCallback

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=steps)

        class Bar(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                if logs and "loss" in logs:
                    said = [f"{name} {logs[name]:.4f}" for name in SHOWN if name in logs] or [
                        f"loss {logs['loss']:.4f}"
                    ]
                    said += [f"retained/budget {logs['occupancy']:.2f}"] if "occupancy" in logs else []
                    progress.update(task, completed=state.global_step, description="  ".join(said))

        yield [Bar()]
