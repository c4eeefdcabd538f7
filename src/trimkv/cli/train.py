"""``trimkv train``: retention gates for a model, from your text."""

import contextlib
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import click
from click.core import ParameterSource

from ..extras import install, install_extra
from . import loading, outputs, reading, show
from .errors import UserError, mendable
from .options import finite, model_options, numbers, output_options, overwrite_option
from .training_progress import SHOWN, watching

LOSSES = ("kl", "ntp", "reverse_kl")
HEADS = ("locret", "seer_attention_r")  # baselines with trained heads
FOR_GATES = ("budget", "stage", "losses", "capacity_weight", "bias_learning_rate", "kind", "intermediate_size")
FOR_GATES += ("average_losses", "response_only", "fast", "eviction_budgets")
FOR_HEADS = {"width": HEADS, "block_size": HEADS[1:]}  # option -> methods that have it
WORDS = (
    "kl: nats by which the predictions differ from the full model's. capacity: tokens retained beyond the budget of "
    "{budget:g}, over the tokens seen, on average. retained: the sum of what is left of each token, beta^age, over the "
    "budget: above 1 more is remembered than there is room for, and the least of it is evicted."
)
REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # name -> packages, one of them


@click.command(short_help="Train retention gates for a model, or a baseline's heads.")
@click.option("--data", multiple=True, metavar="FILE...", help="A .txt or .jsonl file, also .gz, or a hub dataset id.")
@click.argument("more_data", nargs=-1, metavar="")
@click.option("--output", required=True, metavar="DIR", help="A folder for gates.safetensors and gates.json.")
@click.option(
    "--method",
    type=click.Choice(["trimkv", *HEADS]),
    default="trimkv",
    show_default=True,
    help="What is trained. The heads of the baselines take their published settings where an option is left out, "
    "whatever default is shown here.",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=1),
    callback=finite,
    default=32,
    show_default=True,
    help="M of the capacity loss: tokens that each head may retain. Less than the budgets that the gates will serve.",
)
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
@click.option(
    "--eviction-budgets",
    default="48,640",
    show_default=True,
    metavar="LOW,HIGH",
    help="Of stage eviction: slots per head are drawn between these for each sample. Less than --context.",
)
@click.option("--losses", default="kl", show_default=True, help=f"Of {', '.join(LOSSES)}, with commas between.")
@click.option(
    "--average-losses", is_flag=True, help="Take the mean of several losses instead of their sum, as the authors' code."
)
@click.option(
    "--capacity-weight",
    type=click.FloatRange(min=0),
    callback=finite,
    default=4.0,
    show_default=True,
    help="Of the capacity loss, which says by how much gates retain more than --budget tokens: more weight, more is "
    "forgotten.",
)
@click.option(
    "--learning-rate", type=click.FloatRange(min=0, min_open=True), callback=finite, default=3e-3, show_default=True
)
@click.option(
    "--bias-learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    callback=finite,
    default=5e-2,
    show_default=True,
)
@click.option("--kind", type=click.Choice(["rg", "rg2", "rg3"]), default="rg", show_default=True)
@click.option("--intermediate-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--width", type=click.IntRange(min=1), help="Of a baseline's heads.  [default: as published]")
@click.option("--block-size", type=click.IntRange(min=1), help="Of seer_attention_r.  [default: as published]")
@click.option(
    "--no-borders",
    is_flag=True,
    help="A record may attend to the records before it in its context. By default a border parts them, so that short "
    "records teach nothing about long contexts.",
)
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
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output, if it is of this training.")
@overwrite_option
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
        raise UserError(f"training needs accelerate: {install_extra('train')}")
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
        if o.method == "trimkv":
            click.echo(show.faint(WORDS.format(budget=o.budget)))


def _run(o: SimpleNamespace) -> dict:
    from ..train import processes, run_folder

    data = [*o.data, *o.more_data]
    _check_data(data)
    outputs.check_folder(Path(o.output))
    if o.resume and o.overwrite:
        raise UserError("--resume goes on with what is there, --overwrite replaces it: choose one")
    with mendable():
        if not o.resume:
            run_folder.check_free(o.output, o.overwrite)
        checkpoint = run_folder.checkpoint_in(o.output, o.resume)
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
    sources = _sources(data, o)
    if checkpoint is not None:
        _check_checkpoint(checkpoint, config, sources, dtype, o)
    dataset = _dataset(sources, config, o)
    model = loading.load_model(o.model, device, dtype)
    return _train(model, dataset, config, start, o)


def _check_data(data: list[str]) -> None:
    """Looks at the first record of each file, before anything slow starts."""
    from ..train.hub import check, is_hub

    if not data:
        raise UserError("no data: give --data FILE")
    with mendable():
        for name in data:
            check(name) if is_hub(name) else reading.check([name])


def _sources(data: list[str], o: SimpleNamespace) -> list:
    """The data as sources; hub datasets with the revision that they have now."""
    from ..train.data import Source
    from ..train.hub import is_hub, pin

    with mendable():
        names = [pin(name) if is_hub(name) else name for name in data]
    return [Source(name, borders=not o.no_borders) for name in names]


def _check_checkpoint(checkpoint: Path, config, sources: list, dtype: str, o: SimpleNamespace) -> None:
    """Refuses the checkpoint of another training, as far as it is known before a model is loaded."""
    from ..train.made_of import settings_of, versions
    from ..train.run_folder import check_same

    with mendable(), loading.status("reading the data"):
        known = {"method": o.method, "dtype": dtype, **settings_of(config), "versions": versions()}
        check_same(checkpoint, {**known, "data": [source.fingerprint() for source in sources]})


def _dataset(sources: list, config, o: SimpleNamespace):
    """The samples. What is wrong with the data is said here, before the weights are read."""
    from ..train import processes
    from ..train.data import PackedTexts

    tokenizer = loading.load_tokenizer(o.model)
    dataset = PackedTexts(
        sources,
        tokenizer,
        config.context,
        seed=config.seed,
        response_only=o.response_only,
        samples=config.steps * config.batch_size * config.accumulation * processes.count(),
    )
    with loading.quiet(), mendable(), loading.status("reading the data"):
        dataset[0]
        longest = dataset.longest_document
    if o.method != "trimkv" or config.stage == "decay" and not config.capacity_weight:
        return dataset
    least, option = (
        (config.budget, "--budget") if config.stage == "decay" else (config.budgets[0], "--eviction-budgets")
    )
    if longest <= least:
        raise UserError(
            f"nothing to learn: the longest document has {longest} tokens, and all fit into {least:g} slots. Give "
            f"longer texts or a smaller {option}, or put records into one context with --no-borders"
        )
    return dataset


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
            raise UserError(f"--report-to {name} needs a package: {install(REPORTERS[name][0])}")
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
    if o.stage == "eviction":
        budgets = _eviction_budgets(o)
    elif "eviction_budgets" in o.given:
        raise UserError("--eviction-budgets means nothing to --stage decay: leave it out")
    else:
        budgets = GateConfig.budgets
    how = {"checkpointing": False, "cuda_graph": True, "compile": True} if o.fast else {}
    return GateConfig(
        losses=losses, report_to=reporters, budgets=budgets, **how, **{name: getattr(o, name) for name in names}
    )


def _eviction_budgets(o: SimpleNamespace) -> tuple[int, int]:
    """The range from which the eviction stage draws; a budget that evicts nothing would train nothing."""
    budgets = numbers(o, "eviction_budgets")
    if len(budgets) != 2 or budgets[0] >= budgets[1]:
        raise UserError(f"--eviction-budgets {o.eviction_budgets}: two numbers LOW,HIGH, the first one smaller")
    if budgets[1] >= o.context:
        raise UserError(
            f"--eviction-budgets {o.eviction_budgets}: nothing is evicted at {budgets[1]} slots in a context of "
            f"{o.context} tokens. Name a HIGH below {o.context}, or a longer --context"
        )
    return budgets


def _head_config(o: SimpleNamespace, reporters: tuple[str, ...]):
    """The published settings and what was typed. The warm-up keeps its share of the steps."""
    from ..train.heads import HeadConfig

    published = getattr(HeadConfig, o.method)
    names = ("context", "steps", "batch_size", "accumulation", "learning_rate", "width", "block_size", "seed")
    typed = {name: getattr(o, name) for name in (*names, "save_steps") if name in o.given}
    if "steps" in typed:
        typed["warmup_steps"] = published().warmup_steps * o.steps // published().steps
    return published(report_to=reporters, **typed)


def _train(model, dataset, config, start, o: SimpleNamespace) -> dict:
    from ..train import processes
    from ..train.trainer import SaveError

    if o.method == "trimkv":
        from ..train.trainer import train as run
    else:
        from ..train.heads import train_heads as run
    tokens = config.batch_size * config.accumulation * config.context * processes.count()
    with loading.quiet(), mendable((ValueError, SaveError)), watching(config.steps, tokens) as callbacks:
        meta = {"data": ", ".join(_named(source.path) for source in dataset.sources), "base_model": o.model}
        result = run(model, dataset, config, o.output, start, o.resume, meta, callbacks, o.overwrite)
    return {"method": o.method, "final_kl": None, "final_capacity": None, **result}


def _named(data: str) -> str:
    """A file without its folder; a hub dataset in full."""
    return Path(data).name if Path(data).exists() else data
