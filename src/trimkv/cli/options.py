"""Options that several commands share, each declared once."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import click

from .errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def finite(context, parameter, value):
    """``nan`` passes every range check of click."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number to work with")
    return value


def _remember_debug(context: click.Context, parameter, value: bool) -> None:
    if value:
        context.obj.debug = True


def numbers(o: SimpleNamespace, name: str) -> tuple[int, ...]:
    """What an option with commas holds, each number once."""
    text = getattr(o, name)
    try:
        found = tuple(dict.fromkeys(int(part.replace("_", "")) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UserError(f"--{name.replace('_', '-')} {text}: whole numbers of at least 1, with commas between")
    return found


def all_of(*options: Callable) -> Callable:
    """Several options as one decorator."""

    def decorate(function):
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


debug_option = click.option(
    "--debug",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show the traceback of an error.",
)

output_options = all_of(
    click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout; notes go to stderr."),
    debug_option,
)

overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace what --output (or --figure) names, whatever it holds."
)

model_options = all_of(
    click.option(
        "--model", default="smollm2", show_default=True, help="Alias (smollm2), folder or Hugging Face id of a model."
    ),
    click.option(
        "--gates",
        default="bundled",
        show_default=True,
        help="Trained gates: bundled (what ships for the model), none, a folder or a Hugging Face id.",
    ),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="auto is float32 on a CPU and bfloat16 on a GPU.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True),
)

sharing_options = all_of(
    click.option(
        "--scope",
        type=click.Choice(["head", "layer", "global"]),
        default="head",
        show_default=True,
        help="Who shares the slots: each head has its own, or the heads of a layer (or of all layers) share them, and "
        "the tokens with the best scores stay whatever their head.",
    ),
    click.option(
        "--split",
        type=click.Choice(["trained", "even", "gates"]),
        default="trained",
        show_default=True,
        help="How the budget is split among layers: even gives every layer the same number of slots. trained gives "
        "policy trimkv the split that its gates come with: some layers more than the budget, others less, and the "
        "budget on average. gates gives this split to every policy.",
    ),
    click.option(
        "--floor",
        type=click.FloatRange(0, 1),
        callback=finite,
        default=0.0,
        show_default=True,
        help="With --scope layer or global: the part of the budget, from 0 to 1, that each head keeps for itself; the "
        "rest is shared.",
    ),
)

budget_options = all_of(
    click.option(
        "--policy",
        help="Who decides what is kept: see `trimkv policies`.  [default: trimkv where trained "
        "gates for the model are at hand, else streaming_llm]",
    ),
    click.option("--budget", type=int, default=256, show_default=True, help="Slots per layer and KV head."),
    click.option("--sinks", type=int, default=0, show_default=True, help="First tokens that are never evicted."),
    click.option("--recent", type=int, default=0, show_default=True, help="Newest tokens that are never evicted."),
    click.option(
        "--buffer",
        type=int,
        default=0,
        show_default=True,
        help="Tokens allowed above the budget between evictions. They are attended, and counted.",
    ),
    click.option(
        "--prefill-chunk",
        type=click.IntRange(min=1),
        default=512,
        show_default=True,
        help="Tokens of the prompt per forward pass.",
    ),
    click.option(
        "--profile",
        type=click.Choice(["fixed", "paper"]),
        default="fixed",
        show_default=True,
        help="paper: the policy as its authors' code has it, also where that exceeds the budget.",
    ),
    sharing_options,
)


def sampling_options(
    max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, repetition_penalty: float = 1.0
) -> Callable:
    """How tokens are drawn; the defaults differ between commands."""
    return all_of(
        click.option("--max-new-tokens", type=click.IntRange(min=1), default=max_new_tokens, show_default=True),
        click.option(
            "--temperature",
            type=click.FloatRange(0, 100),
            callback=finite,
            default=temperature,
            show_default=True,
            help="0 takes the most probable token.",
        ),
        click.option(
            "--top-p", type=click.FloatRange(0, 1, min_open=True), callback=finite, default=top_p, show_default=True
        ),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(0, 100, min_open=True),
            callback=finite,
            default=repetition_penalty,
            show_default=True,
            help="Above 1 makes tokens that were already seen less likely.",
        ),
    )
