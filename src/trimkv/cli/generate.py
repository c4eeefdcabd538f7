"""``trimkv generate``: one prompt, one answer."""

import sys
from pathlib import Path
from types import SimpleNamespace

import click

from . import loading, show
from .errors import UserError, mendable
from .options import budget_options, model_options, output_options, sampling_options
from .run import LengthWarning, Run


@click.command()
@click.option("--prompt", help="The prompt.")
@click.option("--prompt-file", help="A UTF-8 text file with the prompt; - reads standard input.")
@click.option("--system", help="System message, for models with a chat template.")
@click.option(
    "--chat/--no-chat",
    "as_chat",
    default=None,
    help="Put the prompt into the model's chat template, or don't.  [default: where the model has one]",
)
@model_options
@budget_options
@sampling_options(max_new_tokens=128)
@output_options
def generate(**options):
    """Answer a prompt with a bounded KV cache."""
    o = SimpleNamespace(**options)
    prompt = _prompt(o.prompt, o.prompt_file)
    run = Run.check(o)
    ids = _encode(run.tokenizer, prompt, o)
    model, cache = run.start()
    LengthWarning(model, o.model).check(len(ids) + o.max_new_tokens)
    out = _answer(run, model, cache, ids)
    if not o.as_json:
        click.echo("\n\n" + show.faint(show.saved_line(cache, run.bounded)))
        return
    show.emit(
        {
            "text": out.text,
            "model": o.model,
            "policy": run.policy,
            "budget": o.budget,
            "prompt_tokens": len(ids),
            "new_tokens": len(out.token_ids),
            "prefill_seconds": out.prefill_seconds,
            "decode_tokens_per_second": out.decode_tokens_per_second,
            "finish_reason": out.finish_reason,
            **run.report(cache),
        }
    )


def _answer(run: Run, model, cache, ids: list[int]):
    from .answer import answer

    o = run.options
    with loading.quiet(), show.Reading() as reading:

        def write(text: str) -> None:
            click.echo(text, nl=False)

        return answer(
            model,
            run.tokenizer,
            cache,
            list(ids),
            run.sampling,
            run.chunk,
            write=None if o.as_json else write,
            reading=reading,
        )


def _prompt(prompt: str | None, file: str | None) -> str:
    if prompt is None and file is None:
        raise UserError("no prompt: give --prompt or --prompt-file")
    if prompt is not None and file is not None:
        raise UserError("two prompts: give --prompt or --prompt-file, not both")
    if prompt is None:
        prompt = _read(file)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8 text") from None
    if not prompt.strip():
        raise UserError("the prompt is empty")
    return prompt


def _read(file: str) -> str:
    name = "standard input" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if b"\0" in data:
        raise UserError(f"{name}: binary data, not text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start}: {error.reason})") from error


def _encode(tokenizer, prompt: str, o: SimpleNamespace) -> list[int]:
    from .turns import encode, first_turn

    has_template = bool(getattr(tokenizer, "chat_template", None))
    as_chat = has_template if o.as_chat is None else o.as_chat
    if as_chat and not has_template:
        raise UserError(f"{o.model} has no chat template: leave out --chat")
    if o.system is not None and not as_chat:
        raise UserError("--system needs a chat template")
    if as_chat:
        with mendable():
            ids = encode(tokenizer, first_turn(tokenizer, prompt, o.system))
    else:
        ids = tokenizer(prompt, verbose=False).input_ids
    if not ids:
        raise UserError(f"the prompt has no tokens in the vocabulary of {o.model}")
    return ids
