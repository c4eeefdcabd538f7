"""A chat and a prompt on a real terminal: a pty, with a program of its own behind it."""

import errno
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from fcntl import ioctl

import pytest

CTRL_C, CTRL_D = "\x03", "\x04"
PROMPT = "\r\n>"
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_])")

# Says on stderr when torch begins to be imported.
WATCH_TORCH = """
import sys
class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("<torch>", file=sys.stderr, flush=True)
sys.meta_path.insert(0, Watch)
from trimkv.cli import main
main()
"""


class Terminal:
    """A program on a terminal of 200 columns."""

    def __init__(self, *arguments, home, out=None):
        self.seen, self.mark, self.code = "", 0, None
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TRIMKV_HOME=str(home), TERM="xterm")
            os.environ.pop("COLUMNS", None)
            if out is not None:
                os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
            os.execv(sys.executable, [sys.executable, "-c", WATCH_TORCH, *map(str, arguments)])
        ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))

    def press(self, keys: str) -> None:
        self.mark = len(self.seen)
        os.write(self.fd, keys.encode())

    def expect(self, text: str, seconds: float = 60) -> str:
        """What was shown since the last key or ``expect``, up to this text."""
        end = time.monotonic() + seconds
        while text not in self.seen[self.mark :]:
            if not self.read(end - time.monotonic()):
                pytest.fail(f"no {text!r} in {self.seen[self.mark :]!r}")
        found = self.seen.index(text, self.mark) + len(text)
        shown, self.mark = self.seen[self.mark : found], found
        return shown

    def read(self, seconds: float) -> bool:
        """Whether more came."""
        if not select.select([self.fd], [], [], max(seconds, 0))[0]:
            return False
        try:
            data = os.read(self.fd, 65536)
        except OSError as error:  # Linux says so when the program has ended
            assert error.errno == errno.EIO
            data = b""
        self.seen += ESCAPES.sub("", data.decode("utf-8", "replace"))
        return bool(data)

    def end(self) -> int:
        """The exit code, when the program has ended."""
        if self.code is None:
            while self.read(100):
                pass
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self.fd)
        return self.code

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.fd)[3] & termios.ECHO)


@pytest.fixture
def terminal(tmp_path):
    started = []

    def start(*arguments, **options):
        started.append(Terminal(*arguments, home=tmp_path / "home", **options))
        return started[-1]

    yield start
    for one in started:
        if one.code is None:
            os.kill(one.pid, 9)
            one.end()


def test_a_conversation(terminal, folder, tmp_path):
    options = ("--budget", 24, "--prefill-chunk", 1, "--max-new-tokens", 4, "--temperature", 0)
    chat = terminal("chat", "--model", folder, *options)
    shown = chat.expect("/help lists the commands")
    assert "starting" in shown.partition("<torch>")[0], "the first sign of life comes before anything slow"
    assert "holds at most 24 tokens per head" in shown
    chat.expect(PROMPT)

    chat.press("/help\r")
    chat.expect(f"What you type is kept in {tmp_path}/home/chat_history")
    chat.expect(PROMPT)

    chat.press("\x1b[200~one\rtwo\rthree\x1b[201~")
    chat.expect("three")
    chat.press("\r")
    chat.expect("[cut at 4 tokens: --max-new-tokens, or here /set")
    chat.expect("seen ")
    chat.expect(PROMPT)

    file = tmp_path / "chat.json"
    chat.press(f"/save {file}\r")
    chat.expect("2 messages written")
    chat.expect(PROMPT)
    first = json.loads(file.read_text())["messages"]
    assert first[0] == {"role": "user", "content": "one\ntwo\nthree"}, "one message, not three"

    chat.press("\x1b[200~" + "a long message " * 200 + "\x1b[201~")
    chat.expect("message ")
    chat.press("\r")
    chat.expect("reading")
    chat.press(CTRL_C)
    chat.expect("[stopped while reading: this message was dropped")
    chat.expect(PROMPT)
    chat.press(f"/save! {file}\r")
    chat.expect("2 messages written")
    chat.expect(PROMPT)
    assert json.loads(file.read_text())["messages"] == first
    chat.press("\x1b[A\x1b[A")
    chat.expect("a long message")  # the arrow brings it back
    chat.press(CTRL_C)

    chat.press("/set max-new-tokens 100000\r")
    chat.expect("from the next answer on")
    chat.expect(PROMPT)
    chat.press("/retry\r")
    chat.expect("reading")
    while "reading" in chat.seen[-200:]:
        assert chat.read(60), "the answer is written while one waits"
    assert not chat.echoes(), "what is typed now would stand amidst the answer"
    chat.press(CTRL_C)
    chat.expect("[stopped]")
    chat.expect(PROMPT)

    chat.press(CTRL_C)
    chat.expect("(Ctrl-C once more, or Ctrl-D, leaves)")
    chat.expect(PROMPT)
    chat.press("text")
    chat.expect("text")
    chat.press(CTRL_C)
    time.sleep(0.1)
    chat.press(CTRL_C)
    chat.expect("(Ctrl-C once more, or Ctrl-D, leaves)")
    chat.expect(PROMPT)
    chat.press(CTRL_D)
    assert chat.end() == 0
    assert "a long message" in (tmp_path / "home" / "chat_history").read_text()


def test_answers_go_to_a_file_while_one_types(terminal, folder, tmp_path):
    """trimkv chat > answers.txt: the line to type in is on the terminal all the same, and the file has answers only."""
    out = tmp_path / "answers.txt"
    chat = terminal("chat", "--model", folder, "--max-new-tokens", 3, out=out)
    chat.expect(PROMPT)
    chat.press("hello\r")
    chat.expect("seen ")
    chat.expect(PROMPT)
    chat.press("/exit\r")
    assert chat.end() == 0
    answer = out.read_bytes().decode("utf-8", "replace")
    assert answer.strip("\n") and "\x1b" not in answer and "seen" not in answer


def test_a_prompt_without_any_says_what_to_do(terminal):
    generate = terminal("generate")
    assert generate.end() == 2
    assert generate.seen.startswith("trimkv: error: no prompt: give 'PROMPT', --prompt TEXT or --prompt-file FILE")


def test_an_answer_with_what_was_saved_below_it(terminal, folder):
    generate = terminal("generate", "hello", "--model", folder, "--max-new-tokens", 3, "--budget", 20)
    assert generate.end() == 0
    shown = generate.seen
    assert "starting" in shown.partition("<torch>")[0]
    last = shown[shown.index("[cut at 3 tokens: --max-new-tokens]") :].replace("\r\n", "\n")
    assert re.fullmatch(r"\[cut [^]]+\]\n\nseen \d+ tokens · held 20 per head · cache [^)]+\)\n", last), last
