"""``trimkv chat``: a conversation without end in a cache that never grows."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import click

from ..engine.interrupt import interruptible
from . import loading, show
from .errors import UserError, one_line
from .options import budget_options, model_options, output_options, sampling_options
from .run import LengthWarning, Run

PENALTY_WINDOW = 512  # tokens before an answer that the repetition penalty covers
HELP = """/reset  forget everything and start anew
/stats  what the cache holds
/help   this list
/quit   leave (so does Ctrl-D); Ctrl-C stops a running answer"""


@click.command(short_help="Talk with a model in a cache that never grows.")
@click.option("--system", help="System message.")
@model_options
@budget_options
@sampling_options(max_new_tokens=512, temperature=0.2, top_p=0.9, repetition_penalty=1.1)  # small models go in circles
@output_options
def chat(**options):
    """Talk with a model; one bounded KV cache holds the whole conversation."""
    o = SimpleNamespace(**options)
    run = Run.check(o)
    if not getattr(run.tokenizer, "chat_template", None):
        raise UserError(f"{o.model} has no chat template; it can continue texts: trimkv generate --model {o.model}")
    Chat(run).talk()


class Chat:
    """The terminal's side of a conversation: reads lines, obeys commands, prints answers."""

    def __init__(self, run: Run):
        from .conversation import Conversation

        self.run, self.json = run, run.options.as_json
        self.model, self.cache = run.start()
        o = run.options
        self.conversation = Conversation(
            *(self.model, run.tokenizer, self.cache, replace(run.sampling, penalty_window=PENALTY_WINDOW), run.chunk),
            system=o.system,
        )
        self.turns: list[dict] = []
        self.length = LengthWarning(self.model, o.model)

    def talk(self) -> None:
        if sys.stdin.isatty():
            self._say(f"{self.run.options.model}, {self.run.policy}, {self._limit()}. /help lists the commands.")
        for line in _lines():
            line = line.strip()
            if not line:
                continue
            if re.fullmatch(r"/\w+", line):
                if line == "/quit":
                    break
                self._obey(line)
            else:
                self._answer(line)
        if self.json:
            show.emit(self._report())

    def _answer(self, message: str) -> None:
        write = None if self.json else (lambda text: click.echo(text, nl=False))
        with loading.quiet(), show.Reading() as reading, interruptible() as stopped:
            try:
                out = self.conversation.say(message, write, stopped, reading)
            except ValueError as error:
                # Only the template speaks in ValueErrors about a message; nothing was fed yet.
                loading.note(one_line(error))
                return
        self.turns.append(
            {
                "prompt": message,
                "text": out.text,
                "prompt_tokens": out.prompt_tokens,
                "new_tokens": len(out.token_ids),
                "finish_reason": out.finish_reason,
                "prefill_seconds": out.prefill_seconds,
                "decode_tokens_per_second": out.decode_tokens_per_second,
                "seen_tokens": self.cache.get_seq_length(),
                "held_tokens": round(self.cache.mean_held_tokens),
                "cache_bytes": self.cache.nbytes,
            }
        )
        if not self.json:
            click.echo("" if out.finish_reason != "interrupted" else " [stopped]")
        self._say(show.saved_line(self.cache, self.run.bounded))
        self.length.check(self.cache.get_seq_length())

    def _obey(self, command: str) -> None:
        if command == "/reset":
            self.conversation.reset()
            self._say("everything forgotten; the cache stays allocated")
        elif command == "/stats":
            self._say(self._stats())
        elif command == "/help":
            self._say(HELP)
        else:
            self._say(f"unknown command {command}; /help lists the commands")

    def _stats(self) -> str:
        cache = self.cache
        return "\n".join(
            [
                show.saved_line(cache, self.run.bounded),
                f"policy {self.run.policy}, {self._limit()}",
                f"most tokens attended per head: {cache.peak_prefill_tokens:,} while reading, "
                f"{cache.peak_decode_tokens:,} while writing",
                f"most bytes: {show.bytes_text(cache.peak_bytes)}, with the copies that reading makes",
            ]
        )

    def _limit(self) -> str:
        return f"{self.run.budget.slots:,} slots per head" if self.run.bounded else "no limit"

    def _say(self, text: str) -> None:
        click.echo(show.faint(text), err=self.json)

    def _report(self) -> dict:
        o = self.run.options
        return {
            "model": o.model,
            "policy": self.run.policy,
            "budget": o.budget,
            "turns": self.turns,
            "seen_tokens": self.cache.get_seq_length(),
            "held_tokens": round(self.cache.mean_held_tokens),
            **self.run.report(self.cache),
        }


def _lines() -> Iterator[str]:
    """What is typed, or what is piped in, until its end."""
    if not sys.stdin.isatty():
        try:
            yield from sys.stdin
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not UTF-8 text ({error.reason})") from error
        return
    try:
        import readline  # noqa: F401  gives input() history and line editing
    except ImportError:
        pass
    asked_twice = False
    while True:
        try:
            line = input("\n> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            if asked_twice:
                raise
            asked_twice = True
            click.echo("\n(Ctrl-C again or Ctrl-D leaves)")
            continue
        asked_twice = False
        yield line
