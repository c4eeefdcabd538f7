"""What becomes a message, what a command, and what is said of bytes that are no text."""

import io
import os
import subprocess
import sys

import pytest

from trimkv.cli import user_text
from trimkv.cli.errors import UserError
from trimkv.cli.messages import Command, join_blocks, parse


@pytest.mark.parametrize(
    "text, found",
    [
        ("hello", "hello"),
        ("  hello \n", "hello"),
        ("two\nlines", "two\nlines"),
        ("", None),
        (" \n ", None),
        ("/save x y.json", Command("save", "x y.json")),
        ("/save! x", Command("save!", "x")),
        ("/clear", Command("clear", "")),
        ("/", Command("", "")),
        ("/system be\nbrief", Command("system", "be\nbrief")),
        ("//etc is a folder", "/etc is a folder"),
        ('"""one\n\ntwo"""', "one\n\ntwo"),
        ('"""\n/save x\n"""', "/save x"),
        ('""""""', None),
        ('he said """', 'he said """'),
    ],
)
def test_what_was_entered(text, found):
    assert parse(text) == found


def test_lines_between_triple_quotes_are_one_message():
    lines = ["a", '"""b', "", '  c"""', '"""d"""', "e"]
    assert list(join_blocks(lines)) == ["a", '"""b\n\n  c"""', '"""d"""', "e"]
    with pytest.raises(UserError, match="must end with"):
        list(join_blocks(['"""never', "ended"]))


@pytest.fixture
def stdin(monkeypatch):
    def put(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))

    return put


def test_piped_lines_are_utf_8_whatever_the_locale(stdin):
    stdin("\ufeffgrün\r\nblau".encode())
    assert list(user_text.stdin_lines()) == ["grün", "blau"]


@pytest.mark.parametrize(
    "data, said",
    [
        (b"hello\ncaf\xe9\n", "standard input: not UTF-8 text (line 2: "),
        ("hello\nthere".encode("utf-16"), "standard input: UTF-16 text; save it as UTF-8"),
        ("hello\nthere".encode("utf-16-le"), "standard input: UTF-16 text; save it as UTF-8"),
        ("hello\nthere".encode("utf-16-be"), "standard input: UTF-16 text; save it as UTF-8"),
        (b"hello\nth\0re", "standard input: binary data, not text (line 2)"),
    ],
)
def test_what_is_piped_in_and_no_text_is_named(stdin, data, said):
    stdin(data)
    with pytest.raises(UserError) as error:
        list(user_text.stdin_lines())
    assert str(error.value).startswith(said)


ENTERED = """
import trimkv.cli.chat as chat
from trimkv.cli import main

class Entered:
    typed = False
    check = staticmethod(lambda options: options)
    def __init__(self, options):
        print(ascii(options.system), flush=True)
    def talk(self):
        for text in entered(self):
            print(ascii(text), flush=True)

entered, chat.Chat = chat.Chat._entered, Entered
main()
"""


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C"}, ASCII])
def test_a_wrong_byte_ends_a_piped_chat_in_one_line(locale):
    """No traceback in the locales that containers have, and bytes that are UTF-8 are read as that in all of them."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}

    def chat(system: bytes, data: bytes):
        arguments = [sys.executable, "-c", ENTERED, "chat", "--system", system]
        return subprocess.run(arguments, input=data, capture_output=True, env={**clean, **locale})

    done = chat("grün".encode(), "hällo\n".encode() + b"caf\xe9\nnever\n")
    assert done.returncode == 2
    assert done.stdout.decode().splitlines() == [ascii("grün"), ascii("hällo")]
    assert done.stderr.decode().startswith("trimkv: error: standard input: not UTF-8 text (line 2: ")
    assert len(done.stderr.splitlines()) == 1
    done = chat(b"caf\xe9", b"hello\n")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"trimkv: error: --system: not UTF-8 text\n"
