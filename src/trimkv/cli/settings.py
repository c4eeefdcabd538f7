"""What can be changed within a chat, each with the checks of the option it is named after."""

from types import SimpleNamespace

import click

from .errors import UserError
from .options import budget_options, model_options, sampling_options

DRAWING = ("temperature", "top-p", "repetition-penalty", "max-new-tokens", "seed")  # how answers are drawn
HOLDING = ("budget", "policy")  # what the cache holds: it has to be filled anew
NAMES = (*DRAWING, *HOLDING)


@click.command()
@model_options
@budget_options
@sampling_options(max_new_tokens=512)
def _options(**options):
    """Never run: its options check values."""


def parse(name: str, text: object) -> object:
    """The value of a setting as the option of that name would take it.

    Raises:
        UserError: no such setting (all are listed), or not a value for it.
    """
    name = name.removeprefix("--").replace("_", "-")
    if name not in NAMES:
        raise UserError(f"no setting {name}: there are {', '.join(NAMES)}")
    option = next(option for option in _options.params if option.name == key(name))
    try:
        return option.process_value(click.Context(_options), str(text))
    except click.BadParameter as error:
        raise UserError(f"{name} {text}: {error.message.rstrip('.')}") from error


def key(name: str) -> str:
    """The name of a setting among the options: top-p -> top_p."""
    return name.removeprefix("--").replace("-", "_")


def values(options: SimpleNamespace) -> dict:
    """Name -> value of all that describe how answers are drawn."""
    return {name: getattr(options, key(name)) for name in DRAWING}
