"""The group of commands, and the one place where an exception becomes a line and an exit code."""

import os
import sys
import traceback
from types import SimpleNamespace

import click

from .. import __version__
from .bench import bench
from .chat import chat
from .compare import compare
from .errors import one_line, out_of_memory
from .generate import generate
from .info import info
from .options import debug_option
from .policies import policies
from .shares import shares
from .train import train

INTERRUPTED = 130  # 128 + SIGINT, what shells expect


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="trimkv", message="%(prog)s %(version)s")
@debug_option
@click.pass_context
def trimkv(context: click.Context):
    """Run language models in a fixed amount of KV memory."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (generate, chat, compare, train, shares, bench, policies, info):
    trimkv.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 2 something to mend, 1 a failure, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that can't show a character shows a question mark instead
            stream.reconfigure(errors="replace")
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    shared = SimpleNamespace(debug=False, arguments=sys.argv[1:] if arguments is None else arguments)
    try:
        code = trimkv.main(arguments, prog_name="trimkv", standalone_mode=False, obj=shared)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on its way out; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.ClickException as error:
        if shared.debug:
            traceback.print_exc()
        return _fail(one_line(_Said(error)), error.exit_code)
    except Exception as error:
        if shared.debug:
            traceback.print_exc()
            return 1
        if out_of_memory(error):
            return _fail("out of memory: a smaller --budget, --prefill-chunk, --batch-size or model helps", 2)
        return _fail(f"{type(error).__name__}: {one_line(error)} (run again with --debug for the whole story)", 1)


class _Said(Exception):
    """A click exception whose text is the message click would have shown, without its lines about usage."""

    def __str__(self) -> str:
        return self.args[0].format_message()


def _fail(message: str, code: int) -> int:
    print(f"trimkv: error: {message}", file=sys.stderr)
    return code
