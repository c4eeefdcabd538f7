"""What keys do in a chat, through prompt_toolkit's own pipe in the place of a terminal."""

import io
import stat

import pytest
from prompt_toolkit.data_structures import Size
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from prompt_toolkit.output.vt100 import Vt100_Output

from trimkv.cli.chat_commands import COMPLETIONS
from trimkv.cli.keyboard import HINT, Keyboard

CTRL_C, CTRL_D, ENTER, ALT_ENTER, TAB, UP = "\x03", "\x04", "\r", "\x1b\r", "\t", "\x1b[A"
BACKSPACE = "\x7f"


def pasted(text: str) -> str:
    """What a terminal sends that marks what is pasted."""
    return f"\x1b[200~{text}\x1b[201~"


@pytest.fixture
def press():
    """What is entered by keys of which each string arrives at once, and how the chat was left."""

    def call(*keys: str, history=None, output=None) -> list[str]:
        with create_pipe_input() as pipe:
            keyboard = Keyboard(history, COMPLETIONS, input=pipe, output=output or DummyOutput())
            waiting = iter(keys)
            pipe.send_bytes(b"there is always more to read")
            pipe.stdin_reader.read = lambda: next(waiting, CTRL_D)
            found = []
            try:
                for text in keyboard.messages():
                    found.append(text)
            except KeyboardInterrupt:
                return [*found, "interrupted"]
            return [*found, "left"]

    return call


def test_enter_sends(press):
    assert press("hello", ENTER, "you", ENTER) == ["hello", "you", "left"]
    assert press("from another terminal", "\n") == ["from another terminal", "left"]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_pasted_lines_are_one_message(press, end):
    assert press(pasted(f"one{end}two{end}three"), "!", ENTER) == ["one\ntwo\nthree!", "left"]
    assert press(pasted(f"one{end}two{end}"), ENTER) == ["one\ntwo\n", "left"]


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_lines_that_arrive_at_once_are_one_message_where_the_terminal_does_not_mark_them(press, end):
    assert press(f"one{end}two{end}three{end}") == ["one\ntwo\nthree", "left"]
    assert press(f"/help{end}/stats{end}") == ["/help", "/stats", "left"], "typed ahead"


def test_a_new_line_without_sending(press):
    assert press("one", ALT_ENTER, "two", ENTER) == ["one\ntwo", "left"]
    assert press("one", "\x1b", ENTER, "two", ENTER) == ["one\ntwo", "left"]


def test_a_block_is_sent_when_it_ends(press):
    assert press('"""one', ENTER, ENTER, "/two", ENTER, 'three"""', ENTER) == ['"""one\n\n/two\nthree"""', "left"]


class TestCtrlC:
    def test_it_leaves_on_an_empty_line_when_it_is_pressed_twice_in_a_row(self, press, capsys):
        assert press(CTRL_C, CTRL_C, "never", ENTER) == ["interrupted"]
        assert capsys.readouterr().err.count(HINT) == 1

    def test_it_clears_what_was_typed(self, press):
        assert press("wrong", CTRL_C, "right", ENTER) == ["right", "left"]
        assert press('"""wrong', ENTER, "still", CTRL_C, "right", ENTER) == ["right", "left"]

    @pytest.mark.parametrize(
        "keys",
        [
            (CTRL_C, "text", CTRL_C, CTRL_C),  # cleared, then the first one on an empty line
            (CTRL_C, "text", ENTER, CTRL_C),
            (CTRL_C, "t", BACKSPACE, CTRL_C),
            ("text", CTRL_C, CTRL_C),
        ],
    )
    def test_other_keys_between_make_it_the_first_again(self, press, keys):
        assert press(*keys, "here", ENTER)[-2:] == ["here", "left"]


class TestHistory:
    def test_it_is_kept_between_starts_for_its_owner_only(self, press, tmp_path):
        path = tmp_path / "new" / "chat_history"
        press("first", ENTER, pasted("two\nlines"), ENTER, history=path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o644)
        assert press(UP, ENTER, UP, UP, UP, ENTER, history=path) == ["two\nlines", "first", "left"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_a_folder_that_cannot_be_written_is_named_and_the_chat_goes_on(self, press, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert press("hello", ENTER, UP, ENTER, history=tmp_path / "file" / "history") == ["hello", "hello", "left"]
        assert "is not remembered" in capsys.readouterr().err


def test_bytes_that_are_not_utf_8_are_not_sent(press, tmp_path, capsys):
    assert press("caf\udce9", ENTER, "caf\udcc3\udca9", ENTER, history=tmp_path / "h") == ["café", "left"]
    assert "not UTF-8 text" in capsys.readouterr().err


class TestCompletion:
    def test_commands_settings_and_files(self, press, tmp_path):
        (tmp_path / "talk.json").write_text("{}")
        assert press("/retr", TAB, ENTER) == ["/retry", "left"]
        assert press("/set max", TAB, " 5", ENTER) == ["/set max-new-tokens 5", "left"]
        assert press(f"/load {tmp_path}/ta", TAB, ENTER) == [f"/load {tmp_path}/talk.json", "left"]

    def test_nothing_is_completed_in_a_message(self, press):
        assert press("retr", TAB, ENTER) == ["retr", "left"]


def test_no_question_is_sent_to_the_terminal(press):
    """A terminal's reply to "where is the cursor" would stand in the next line."""
    screen = io.StringIO()
    press("hello", ENTER, output=Vt100_Output(screen, lambda: Size(rows=24, columns=80), enable_cpr=True))
    assert "hello" in screen.getvalue() and "\x1b[6n" not in screen.getvalue()
