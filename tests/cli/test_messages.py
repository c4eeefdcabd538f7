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
    assert list(user_text.StdinLines()) == ["grün", "blau"]


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
        list(user_text.StdinLines())
    assert str(error.value).startswith(said)


ENTERED = """
import trimkv.cli.chat as chat
from trimkv.cli import main

class Entered:
    check = staticmethod(lambda options: options)
    def __init__(self, options, lines):
        print(ascii(options.system), flush=True)
        self.lines = lines
    def talk(self):
        for text in self.lines:
            print(ascii(text), flush=True)

chat.Chat = Entered
main()
"""


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C"}, ASCII])
def test_a_wrong_byte_ends_a_piped_chat_in_one_line(locale):
    """No traceback in the locales that containers have, and bytes that are UTF-8 are read as that in all of them."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}

    def start(system: bytes):
        arguments = [sys.executable, "-c", ENTERED, "chat", "--system", system]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(arguments, env={**clean, **locale}, **pipes)

    chat = start("grün".encode())
    assert chat.stdout.readline().decode() == ascii("grün") + "\n"
    chat.stdin.write("hällo\n".encode())
    chat.stdin.flush()
    assert chat.stdout.readline().decode() == ascii("hällo") + "\n", "a line is a message before the next is there"
    out, err = chat.communicate(b"caf\xe9\nnever\n")
    assert (chat.returncode, out) == (2, b"")
    assert err.decode().startswith("trimkv: error: standard input: not UTF-8 text (line 2: ")
    assert len(err.splitlines()) == 1
    out, err = start(b"caf\xe9").communicate(b"hello\n")
    assert (out, err) == (b"", b"trimkv: error: --system: not UTF-8 text\n")


@pytest.mark.parametrize(
    "data, said",
    [
        (b"hello\ncaf\xe9", "not UTF-8 text (line 2: "),
        (b"hello\ncaf\xc3", "not UTF-8 text (line 2: "),
        ("hello\nthere".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    ],
)
def test_a_file_in_another_encoding_is_refused_before_its_first_line_is_a_message(tmp_path, data, said):
    (tmp_path / "lines").write_bytes(data)
    with open(tmp_path / "lines", "rb") as lines:
        done = subprocess.run([sys.executable, "-c", ENTERED, "chat"], stdin=lines, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"trimkv: error: standard input: {said}") and len(done.stderr.splitlines()) == 1


def test_lines_that_arrived_before_are_read_whole(monkeypatch):
    reading, writing = os.pipe()
    os.write(writing, b"one\ntwo\nthr" + "ü".encode()[:1])
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
    lines = user_text.StdinLines()
    os.write(writing, "ü".encode()[1:] + b"\nfour")
    os.close(writing)
    assert list(lines) == ["one", "two", "thrü", "four"]
