"""``trimkv chat``: a conversation without end in a cache that never grows."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click

from . import loading, show, user_text
from .chat_commands import COMPLETIONS, HELP_HINT, obey
from .ctrl_c import keys_wait, stoppable
from .errors import UserError, one_line
from .messages import Command, join_blocks, parse
from .options import budget_options, model_options, output_options, sampling_options
from .run import LengthWarning, Run
from .wrapping import Screen

PENALTY_WINDOW = 512  # tokens before an answer that the repetition penalty covers


@click.command(short_help="Talk with a model in a cache that never grows.")
@click.option("--system", help="What the model is told before the first message.")
@model_options
@budget_options
@sampling_options(max_new_tokens=512, temperature=0.2, top_p=0.9, repetition_penalty=1.1)  # small models go in circles
@output_options
def chat(**options):
    """Talk with a model; one bounded KV cache holds the whole conversation.

    The KV cache is what a model keeps of each token (a word or a part of one) that it has read or written. Here it has
    a fixed size: the budget says how many tokens each attention head may hold, and the policy decides which of them go
    when all places (slots) are taken. The model no longer knows what has gone. Gates are small trained networks that
    say how long a token will be of use; they may give some layers more places than others, and the budget is then the
    average over layers.

    On a terminal, /help lists what can be typed. From a pipe or a file, each line is a message, and so is a block of
    lines between two \"\"\"; answers go to stdout and remarks to stderr.
    """
    o = SimpleNamespace(**options)
    o.system = user_text.argument(o.system, "--system")
    typed = user_text.stdin_is_terminal() and (sys.stdout.isatty() or sys.stderr.isatty())
    lines = None if typed else user_text.StdinLines()
    Chat(Chat.check(o), lines).talk()


class Chat:
    """The terminal's side of a conversation: reads messages, obeys commands, prints answers.

    Args:
        lines: what is piped in; None where a person types.
    """

    def __init__(self, run: Run, lines: Iterable[str] | None):
        self.json = run.options.as_json
        self.lines, self.typed = lines, lines is None
        self.turns: list[dict] = []
        model, cache = run.start()
        self.use(run, self.new_conversation(run, model, cache))

    @staticmethod
    def check(options: SimpleNamespace) -> Run:
        """A request that a chat can start with. UserError if there is something to mend."""
        run = Run.check(options)
        if not getattr(run.tokenizer, "chat_template", None):
            name = options.model
            raise UserError(f"{name} has no chat template; it can continue texts: trimkv generate --model {name}")
        return run

    def new_conversation(self, run: Run, model, cache):
        """An empty conversation with the system message of the options."""
        from .conversation import Conversation

        sampling = replace(run.sampling, penalty_window=PENALTY_WINDOW)
        return Conversation(model, run.tokenizer, cache, sampling, run.chunk, system=run.options.system)

    def use(self, run: Run, conversation) -> None:
        """Goes on with a conversation, which may be on another model or in another cache."""
        self.run, self.conversation = run, conversation
        self.length = LengthWarning(conversation.model, run.options.model)

    @property
    def cache(self):
        return self.conversation.cache

    @property
    def history(self) -> Path:
        """Where what was typed is kept."""
        from ..embedded import cache_home

        return cache_home() / "chat_history"

    def talk(self) -> None:
        if self.typed:
            self.say(f"{self.run.options.model} · {self.limit()} · {HELP_HINT}")
        for text in self._entered():
            with keys_wait() if self.typed else contextlib.nullcontext():
                if self._take(text):
                    break
        if self.json:
            show.emit(self._report())

    def _take(self, text: str) -> bool:
        """Answers a message or obeys a command. Returns whether the chat shall end."""
        found = parse(text)
        if isinstance(found, Command):
            return obey(self, found)
        if found:
            self.answer(found, self.conversation.say, found)
        return False

    def answer(self, message: str, ask: Callable, *arguments, **marks) -> None:
        """Prints and notes what ``ask(*arguments, write, stopped, reading)`` answers to a message.

        Args:
            marks: further keys of the note.
        """
        screen = Screen()
        with self.working() as (stopped, reading):
            try:
                out = ask(*arguments, None if self.json else screen.write, stopped, reading)
            except ValueError as error:
                # Only the template speaks in ValueErrors about a message; nothing was fed yet.
                show.refusal(one_line(error))
                return
        if not out.token_ids:
            lost = "the answer before stays" if marks else "this message was dropped"
            again = "; the up arrow brings it back" if self.typed and not marks else ""
            self.say(f"\n[stopped while reading: {lost}{again}]")
            return
        self._note(message, out, **marks)
        if not self.json:
            screen.end(" [stopped]" if out.finish_reason == "interrupted" else "")
        if out.finish_reason == "length":
            self.say(show.cut_mark(self.conversation.sampling.max_new_tokens, ", or here /set max-new-tokens N"))
        self.say(show.saved_line(self.cache, self.run.bounded))
        self.length.check(self.cache.get_seq_length())

    @contextlib.contextmanager
    def working(self) -> Iterator[tuple[Callable, Callable]]:
        """While the model reads or writes: ``stopped`` and ``reading``, as ``answer`` takes them."""
        with loading.quiet(), show.Reading() as reading, stoppable(patient=self.typed) as stopped:
            yield stopped, reading

    def say(self, text: str) -> None:
        """A remark beside the conversation."""
        show.remark(text, self.json)

    def limit(self) -> str:
        """What the policy holds at most."""
        held = f"holds at most {show.limit_text(self.cache)}" if self.run.bounded else "holds every token"
        return f"policy {self.run.policy} {held}"

    def _note(self, message: str, out, **marks) -> None:
        self.turns.append(
            {
                "model": self.run.options.model,
                "policy": self.run.policy,
                "prompt": message,
                "text": out.text,
                "prompt_tokens": out.prompt_tokens,
                "new_tokens": len(out.token_ids),
                "finish_reason": out.finish_reason,
                "prefill_seconds": out.prefill_seconds,
                "decode_tokens_per_second": out.decode_tokens_per_second,
                "seen_tokens": self.cache.get_seq_length(),
                "held_tokens": round(self.cache.mean_held_tokens),
                "held_tokens_largest": self.cache.held_tokens,
                "cache_bytes": self.cache.nbytes,
                **marks,
            }
        )

    def _report(self) -> dict:
        o = self.run.options
        return {
            "model": o.model,
            "policy": self.run.policy,
            "budget": o.budget,
            "turns": self.turns,
            "seen_tokens": self.cache.get_seq_length(),
            "held_tokens": round(self.cache.mean_held_tokens),
            "held_tokens_largest": self.cache.held_tokens,
            **self.run.report(self.cache),
        }

    def _entered(self) -> Iterator[str]:
        """What is typed, or what is piped in, until its end."""
        if not self.typed:
            yield from join_blocks(self.lines)
            return
        from .keyboard import Keyboard

        yield from Keyboard(self.history, COMPLETIONS).messages()
