"""Texts that commands are given, as windows of tokens."""

from . import loading
from .errors import UserError, mendable


def check(paths: list[str]) -> None:
    """Looks at the first record of each file: cheaper than finding out after the model was loaded."""
    from ..texts import read_texts

    if not paths:
        raise UserError("no text: give --text FILE")
    with mendable():
        for path in paths:
            next(read_texts([path]))


def windows(paths: list[str], tokenizer, context: int, most: int):
    """int64 [N, context], at most so many."""
    import torch

    from ..texts import file_windows

    with loading.quiet(), loading.status("reading the texts"), mendable():
        windows = list(file_windows(paths, tokenizer, context, most))
    if not windows:
        raise UserError(f"the texts are shorter than one sequence of {context} tokens: give more, or lower --context")
    if len(windows) < most:
        loading.note(f"the texts give {len(windows)} of {most} sequences of {context} tokens")
    return torch.tensor(windows)
