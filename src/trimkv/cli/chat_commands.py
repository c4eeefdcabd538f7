"""The commands of a chat: what begins with one slash."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import click

from . import saved_chat, settings, show
from .errors import UserError, one_line, out_of_memory
from .messages import Command

HELP_HINT = "/help lists the commands"
SLASHES = "A message that begins with a slash is written with two: //like this"
KEYS = (
    "Several lines are one message: paste them; or press Alt-Enter (or Esc, then Enter) for a new line; or write them "
    f'between two """. {SLASHES}.',
    "Ctrl-C while the model reads a message drops the message, and all is as it was before. While the model writes, "
    "Ctrl-C ends the answer, and what was written stays. In a line, Ctrl-C clears the line; on an empty line, pressed "
    "twice, it leaves.",
)


@dataclass(frozen=True)
class _Entry:
    """A command.

    Attributes:
        do: called with the chat and the argument.
        takes: what /help calls its argument; in [] where it can be left out; "" for none.
        help: what it does.
        also: other names.
        files: whether the argument names a file.
        choices: what the Tab key offers for the argument.
    """

    do: Callable
    takes: str
    help: str
    also: tuple[str, ...] = ()
    files: bool = False
    choices: tuple[str, ...] = ()


def obey(chat, command: Command) -> bool:
    """Does what a command says. What is wrong with it is said in one line, and the chat goes on.

    Returns:
        Whether the chat shall end.
    """
    try:
        entry = _find(command.name)
        if entry.takes[:1] not in ("", "[") and not command.argument:
            raise UserError(f"/{command.name} needs {entry.takes}")
        if not entry.takes and command.argument:
            raise UserError(f"/{command.name} takes nothing behind it")
        if "\n" in command.argument and entry.takes != SYSTEM:
            raise UserError(f"/{command.name} takes one line. {SLASHES}")
        entry.do(chat, command.argument)
        return entry is ENTRIES["exit"]
    except UserError as error:
        show.refusal(one_line(error, limit=600))
        return False


def _find(name: str) -> _Entry:
    for known, entry in ENTRIES.items():
        if name in (known, *entry.also):
            return entry
    names = ", ".join(f"/{known}" for known in ENTRIES)
    raise UserError(f"unknown command /{name}; there are {names}. {SLASHES}")


def _help(chat, argument: str) -> None:
    text = click.HelpFormatter(width=show.width())
    text.write_dl([(f"/{name} {entry.takes}".rstrip(), entry.help) for name, entry in ENTRIES.items()])
    kept = (f"What you type is kept in {chat.history} for the up arrow; nobody else may read it.",)
    for paragraph in (*KEYS, *(kept if chat.typed else ())):
        text.write_paragraph()
        text.write_text(paragraph)
    chat.say(text.getvalue().rstrip())


def _clear(chat, argument: str) -> None:
    chat.conversation.reset()
    system = "; the system message stays" if chat.conversation.system else ""
    chat.say(f"everything forgotten: the conversation is empty, and so is the cache{system}")


def _retry(chat, argument: str) -> None:
    conversation = chat.conversation
    if not conversation.messages:
        raise UserError("nothing was said yet, so there is nothing to answer again")
    if conversation.sampling.temperature == 0:
        chat.say("(temperature 0 gives the same answer again: /set temperature 0.7 lets it vary)")
    chat.answer(conversation.messages[-2]["content"], conversation.retry, retry=True)


def _save(chat, argument: str, replace: bool = False) -> None:
    conversation, o = chat.conversation, chat.run.options
    if not conversation.messages:
        raise UserError("nothing was said yet, so there is nothing to save")
    values = {**settings.values(o), "policy": chat.run.policy, "budget": o.budget}
    path = saved_chat.save(argument, conversation.messages, conversation.system, o.model, values, replace)
    chat.say(f"{len(conversation.messages)} messages written to {path}")


def _load(chat, argument: str) -> None:
    saved = saved_chat.load(argument)
    o, had_system = chat.run.options, chat.conversation.system
    values = {name: saved.settings[name] for name in settings.DRAWING if name in saved.settings}
    try:
        values = {name: settings.parse(name, value) for name, value in values.items()}
    except UserError as error:
        raise UserError(f"{argument}: {error}") from error
    if not _read(chat, chat.conversation, saved.messages, saved.system):
        return
    text = f"{len(saved.messages)} messages read from {argument}"
    taken = [f"{name} {value}" for name, value in values.items() if settings.values(o)[name] != value]
    text += f"; from there, too: {', '.join(taken)}" if taken else ""
    text += "; there is no system message in it" if had_system and not saved.system else ""
    now = {"model": o.model, "policy": chat.run.policy, "budget": o.budget}
    then = {"model": saved.model or o.model, **saved.settings}
    other = [f"{name} {then[name]}" for name in now if then.get(name, now[name]) != now[name]]
    text += f"; it was made with {', '.join(other)}, which is not taken over" if other else ""
    _draw(chat, {settings.key(name): value for name, value in values.items()})
    chat.say(text)


def _system(chat, argument: str) -> None:
    conversation = chat.conversation
    if not argument:
        chat.say(conversation.system or "there is no system message")
        return
    system = None if argument == "none" else argument
    messages = tuple(conversation.messages)
    if _read(chat, conversation, messages, system):
        what = "the system message is set" if system else "there is no system message any more"
        chat.say(what + _read_again(messages))


def _model(chat, argument: str) -> None:
    if not argument:
        chat.say(chat.run.options.model)
        return
    messages = _move(chat, model=argument)
    if messages is not None:
        chat.say(f"{argument} · {chat.limit()}{_read_again(messages)}")


def _set(chat, argument: str) -> None:
    o = chat.run.options
    if not argument:
        held = {"budget": o.budget, "policy": chat.run.policy}
        chat.say("\n".join(f"{name} {value}" for name, value in {**settings.values(o), **held}.items()))
        return
    name, _, text = argument.partition(" ")
    value = settings.parse(name, text.strip())
    name = settings.key(name)
    if name not in settings.HOLDING:
        _draw(chat, {name: value})
        chat.say(f"{name.replace('_', '-')} {value}, from the next answer on")
        return
    messages = _move(chat, **{name: value})
    if messages is not None:
        chat.say(f"{chat.limit()}{_read_again(messages)}")


def _stats(chat, argument: str) -> None:
    cache, run = chat.cache, chat.run
    lines = [show.saved_line(cache, run.bounded), chat.limit()]
    if cache.get_seq_length():
        lines += [
            "the most tokens that one head attended to at once: "
            f"{cache.peak_prefill_tokens:,} while reading (those held and those being read), "
            f"{cache.peak_decode_tokens:,} while writing",
            f"the most memory: {show.bytes_text(cache.peak_bytes)} with the copies that reading makes, "
            f"and {show.bytes_text(cache.nbytes)} for /retry",
        ]
    chat.say("\n".join(lines))


def _exit(chat, argument: str) -> None:
    """``obey`` ends the chat."""


def _draw(chat, values: dict) -> None:
    """Changes how answers are drawn, from the next one on."""
    vars(chat.run.options).update(values)
    window = chat.conversation.sampling.penalty_window
    chat.conversation.sampling = replace(chat.run.sampling, penalty_window=window)
    if "seed" in values:
        import torch

        torch.manual_seed(values["seed"])


def _move(chat, **options) -> tuple | None:
    """Goes on with another model, policy or budget, whose cache reads the conversation from its beginning; what was
    there stays until that is done.

    Returns:
        The messages that were read, or None where Ctrl-C stopped it.
    """
    old = chat.conversation
    try:
        run = chat.check(SimpleNamespace(**{**vars(chat.run.options), **options}))
        model = old.model if run.runs_on_model_of(chat.run) else run.load_model()
        new = chat.new_conversation(run, model, run.new_cache(model))
    except KeyboardInterrupt:
        chat.say(f"stopped: still {chat.run.options.model}, {chat.limit()}")
        return None
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise UserError("out of memory: the conversation goes on as it was") from error
        raise
    messages = tuple(old.messages)
    if not _read(chat, new, messages, old.system):
        return None
    chat.use(run, new)
    return messages


def _read(chat, conversation, messages, system) -> bool:
    """Lets a conversation read messages anew. False if Ctrl-C stopped it: everything is as it was."""
    with chat.working() as (stopped, reading):
        try:
            whole = conversation.take_over(messages, system, stopped, reading)
        except ValueError as error:
            raise UserError(one_line(error)) from error
    if not whole:
        chat.say("\n[stopped: everything is as it was before]")
    return whole


def _read_again(messages) -> str:
    return f"; the {len(messages)} messages so far were read again" if messages else ""


SYSTEM = "[TEXT]"
ENTRIES = {
    "help": _Entry(_help, "", "this list"),
    "clear": _Entry(_clear, "", "forget the conversation, and empty the cache (also /reset)", ("reset",)),
    "retry": _Entry(_retry, "", "answer the last message again (also /regenerate)", ("regenerate",)),
    "save": _Entry(_save, "FILE", "write the conversation to a new file, as JSON", files=True),
    "save!": _Entry(
        lambda chat, file: _save(chat, file, replace=True), "FILE", "the same, and replace what is there", files=True
    ),
    "load": _Entry(_load, "FILE", "go on with a saved conversation: the model reads its messages", files=True),
    "system": _Entry(_system, SYSTEM, "show or set the system message, what the model is told first; none removes it"),
    "model": _Entry(_model, "[NAME]", "show the model, or change it: the new one reads the conversation so far"),
    "set": _Entry(_set, "[NAME VALUE]", "show the settings, or change one, like temperature", choices=settings.NAMES),
    "stats": _Entry(_stats, "", "what the cache holds"),
    "exit": _Entry(_exit, "", "leave (also /quit and Ctrl-D)", ("quit",)),
}
COMPLETIONS = {f"/{name}": None if entry.files else list(entry.choices) for name, entry in ENTRIES.items()}
