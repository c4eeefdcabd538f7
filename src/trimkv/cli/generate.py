"""``trimkv generate``: one prompt, one answer."""

import sys
from types import SimpleNamespace

import click

from . import loading, show, slow_prompt, user_text
from .errors import UserError, mendable
from .options import budget_options, model_options, output_options, sampling_options
from .run import LengthWarning, Run
from .wrapping import Screen

FORMS = "'PROMPT', --prompt TEXT or --prompt-file FILE"


@click.command()
@click.argument("words", nargs=-1, metavar="[PROMPT]")
@click.option("--prompt", help="The prompt, in another form.")
@click.option("--prompt-file", help="A UTF-8 text file (or .gz of one) with the prompt; - reads standard input.")
@click.option("--system", help="What a chat model is told before the prompt.")
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
    """Answer a prompt with a bounded KV cache.

    The prompt is PROMPT, --prompt or --prompt-file, and without any of them what is piped in. The answer goes to
    stdout; where that is no terminal, what was saved goes to stderr.

    The KV cache is what a model keeps of each token (a word or a part of one) that it has read or written. Here it has
    a fixed size: the budget says how many tokens each attention head may hold, and the policy decides which of them go
    when all places (slots) are taken. The model no longer knows what has gone. Gates are small trained networks that
    say how long a token will be of use; they may give some layers more places than others, and the budget is then the
    average over layers.
    """
    o = SimpleNamespace(**options)
    prompt = _prompt(o.words, o.prompt, o.prompt_file)
    o.system = user_text.argument(o.system, "--system")
    run = Run.check(o)
    ids = _encode(run.tokenizer, prompt, o)
    model, cache = run.start()
    LengthWarning(model, o.model).check(len(ids) + o.max_new_tokens)
    slow_prompt.warn(model, cache, run.decides, run.chunk, len(ids))
    out = _answer(run, model, cache, ids)
    if not o.as_json:
        if out.finish_reason == "length":
            show.remark(show.cut_mark(o.max_new_tokens))
        if sys.stdout.isatty():
            click.echo()
        show.remark(show.saved_line(cache, run.bounded))
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
    screen = Screen()
    with loading.quiet(), show.Reading() as reading:
        out = answer(
            model,
            run.tokenizer,
            cache,
            list(ids),
            run.sampling,
            run.chunk,
            write=None if o.as_json else screen.write,
            reading=reading,
        )
    if not o.as_json:
        screen.end()
    return out


def _prompt(words: tuple[str, ...], prompt: str | None, file: str | None) -> str:
    """The one prompt that was given, in whichever form. UserError for none, or more than one."""
    given = [form is not None for form in (words or None, prompt, file)]
    if sum(given) > 1:
        raise UserError(f"two prompts: give {FORMS}, only one of them")
    if len(words) > 1:
        raise UserError(f"{len(words)} words where one prompt is expected: put it in quotes, 'like this one'")
    if file is not None:
        prompt = user_text.read_file(file)
    elif any(given):
        prompt = user_text.argument(words[0] if words else prompt, "the prompt")
    elif user_text.stdin_is_terminal():
        raise UserError(f"no prompt: give {FORMS}, or pipe text in")
    else:
        prompt = user_text.read_stdin()
        if not prompt.strip():
            raise UserError(f"no prompt: standard input is empty, and there is no {FORMS}")
    if not prompt.strip():
        raise UserError("the prompt is empty")
    return prompt


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
