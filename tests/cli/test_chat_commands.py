"""The commands of a chat, on a tiny model."""

import json

import pytest

from tiny_text import byte_tokenizer, save_model
from trimkv.cli.chat_commands import ENTRIES

JSON = ("--json",)


@pytest.fixture
def turns(chat):
    """What was asked and answered."""

    def call(*lines: str, options=()):
        code, out, err = chat(*lines, options=(*options, *JSON))
        assert code == 0, err
        return [(turn["prompt"], turn["text"]) for turn in json.loads(out)["turns"]]

    return call


def test_help_names_every_command_and_key(chat):
    code, out, err = chat("/help")
    assert (code, out) == (0, "")
    for fragment in (*(f"/{name}" for name in ENTRIES), '"""', "Alt-Enter", "Ctrl-C", "//", "/reset", "/regenerate"):
        assert fragment in err
    assert max(map(len, err.partition("/help")[2].splitlines())) <= 80


@pytest.mark.parametrize(
    "line, said",
    [
        ("/wat", "unknown command /wat; there are /help, /clear, "),
        ("/usr/bin is a folder", "unknown command /usr/bin; there are "),
        ("/", "unknown command /; there are "),
        ("/save", "/save needs FILE"),
        ("/clear all", "/clear takes nothing behind it"),
        ("/retry", "nothing was said yet"),
        ("/save x.json", "nothing was said yet"),
        ("/load nowhere.json", "nowhere.json: cannot be read (No such file or directory)"),
        ("/set wat 3", "no setting wat: there are temperature, "),
        ("/set temperature", "temperature : "),
        ("/set temperature nan", "temperature nan: "),
        ("/set top-p 7", "top-p 7: 7.0 is not in the range"),
        ("/set budget 0", "budget: tokens must be at least 1"),
        ("/set budget 4", "too small"),
        ("/set policy wat", "'wat'"),
        ("/set policy trimkv", "needs trained gates"),
        ("/model ./nowhere", "./nowhere: no such folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_the_chat_goes_on(chat, line, said):
    code, out, err = chat(line, "hello", options=JSON)
    assert code == 0 and [turn["prompt"] for turn in json.loads(out)["turns"]] == ["hello"], "not sent to the model"
    lines = [each for each in err.splitlines() if said in each]
    assert len(lines) == 1 and lines[0].startswith("trimkv: "), err


def test_slashes_and_blocks(turns):
    found = turns("//etc is a folder", '"""one', "", "/two", '"""', "after", "/exit", "never")
    assert [prompt for prompt, _ in found] == ["/etc is a folder", "one\n\n/two", "after"]


def test_a_block_that_is_not_ended_is_an_error(chat):
    code, out, err = chat('"""one', "two")
    assert (code, out) == (2, "") and err.endswith('must end with """\n')


@pytest.mark.parametrize("clear", ["/clear", "/reset"])
def test_clear_forgets_messages_and_cache(turns, clear):
    found = turns("one", "two", clear, "one")
    assert found[2] == found[0]


@pytest.mark.parametrize("retry", ["/retry", "/regenerate"])
def test_retry_answers_from_the_same_memory(turns, retry):
    found = turns("one", "two", retry, "three")
    assert found[2] == found[1], "greedily it is the same answer, only from the same cache"
    assert found[3:] == turns("one", "two", "three")[2:]


def test_settings_hold_from_the_next_answer_on(chat):
    code, out, err = chat("one", "/set max-new-tokens 2", "/retry", "/set", options=JSON)
    first, second = json.loads(out)["turns"]
    assert (first["new_tokens"], second["new_tokens"]) == (5, 2) and second["retry"]
    assert "[cut at 5 tokens: --max-new-tokens" in err and "[cut at 2 tokens: --max-new-tokens" in err
    assert "max-new-tokens 2\n" in err and "budget 24\n" in err


def test_a_seed_draws_the_same_answer_again(turns):
    hot = ("--temperature", "5")
    found = turns("one", "/set seed 7", "/retry", "/set seed 7", "/retry", "/retry", options=hot)
    answers = [text for _, text in found]
    assert answers[1] == answers[2] != answers[3]


def test_another_budget_or_policy_reads_the_conversation_again(chat, turns):
    code, out, err = chat("one", "/set budget 30", "two", "/set policy random", "three", options=JSON)
    assert code == 0
    found = json.loads(out)
    assert (found["budget"], found["policy"], found["held_tokens"]) == (30, "random", 30)
    assert [turn["policy"] for turn in found["turns"]] == ["streaming_llm", "streaming_llm", "random"]
    assert "holds at most 30 tokens per head; the 2 messages so far were read again" in err
    assert "policy random holds at most 30 tokens per head; the 4 messages so far were read again" in err
    seen = [turn["seen_tokens"] for turn in found["turns"]]
    assert seen[0] < seen[1] < seen[2], "nothing is lost"


def test_another_model_reads_the_conversation_so_far(chat, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    code, out, err = chat("one", f"/model {other}", "two", "/model", options=JSON)
    assert code == 0
    found = json.loads(out)
    assert found["model"] == str(other) and err.splitlines()[-1] == str(other)
    assert "the 2 messages so far were read again" in err
    assert found["seen_tokens"] > found["turns"][0]["seen_tokens"] > 24


def test_a_model_without_a_chat_template_does_not_take_over(chat, tmp_path):
    other = save_model(tmp_path / "other", tokenizer=byte_tokenizer(chat_template=None))
    code, out, err = chat("one", f"/model {other}", "/model", options=JSON)
    assert code == 0 and "has no chat template" in err
    assert err.splitlines()[-1] != str(other)


def test_a_system_message_is_read_first(turns, chat):
    told = turns("/system be brief", "one", "two")
    assert told == turns("one", "two", options=("--system", "be brief")) != turns("one", "two")
    assert turns("/system be brief", "/system none", "one") == turns("one")
    code, _, err = chat("/system", "/system be brief", "one", "/system be loud", "/system")
    assert "there is no system message\n" in err
    assert "the system message is set; the 2 messages so far were read again\nbe loud\n" in err


class TestFiles:
    def test_a_saved_conversation_is_taken_up_again(self, chat, tmp_path):
        file = tmp_path / "a chat.json"
        code, out, err = chat("/system be brief", "one", "two", f"/save {file}", options=JSON)
        assert code == 0 and f"4 messages written to {file}" in err
        saved = json.loads(file.read_text(encoding="utf-8"))
        assert [message["role"] for message in saved["messages"]] == ["system", *["user", "assistant"] * 2]
        assert saved["settings"]["budget"] == 24 and saved["settings"]["temperature"] == 0
        code, out, err = chat("other", f"/load {file}", "/system", "three", options=JSON)
        assert code == 0 and f"4 messages read from {file}" in err and "be brief" in err
        found = json.loads(out)
        assert found["turns"][-1]["seen_tokens"] > 100, "the cache has read the messages"

    def test_nothing_is_overwritten_without_a_word(self, chat, tmp_path):
        file = tmp_path / "chat.json"
        file.write_text("mine")
        code, _, err = chat("one", f"/save {file}")
        assert f"{file} is there already" in err and "/save! " in err and file.read_text() == "mine"
        code, _, err = chat("one", f"/save! {file}")
        assert code == 0 and "2 messages written" in err and json.loads(file.read_text())["messages"]
        assert list(tmp_path.iterdir()) == [file]

    @pytest.mark.parametrize("save", ["/save", "/save!"])
    def test_places_that_cannot_be_written(self, chat, tmp_path, save):
        code, _, err = chat("one", f"{save} {tmp_path}/no/x", f"{save} {tmp_path}", f"{save} /dev/null", "two")
        assert code == 0 and f"{tmp_path}/no/x: cannot be written" in err
        assert err.count("not a file that could be replaced") == 2 and err.count("per head · cache") == 2
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "content, said",
        [
            (b"caf\xe9", "not UTF-8 text"),
            ("{}".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
            (b"{", "not valid JSON"),
            (b"[" * 100_000, "not valid JSON"),
            (b"[]", "no messages in it"),
            (b'{"messages": []}', "messages must be a list"),
            (b'{"messages": [{"role": "user", "content": 3}]}', "content of a message must be a string"),
            (b'{"messages": [{"role": "user", "content": "x"}]}', "user and assistant in turn"),
            (b'{"messages": [{"role": "system", "content": "x"}]}', "user and assistant in turn"),
            (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not valid Unicode"),
        ],
    )
    def test_files_that_hold_no_conversation(self, chat, tmp_path, content, said):
        (tmp_path / "x.json").write_bytes(content)
        code, out, err = chat("one", f"/load {tmp_path}/x.json", "two", options=JSON)
        assert code == 0 and len(json.loads(out)["turns"]) == 2
        lines = [line for line in err.splitlines() if said in line]
        assert len(lines) == 1 and f"{tmp_path}/x.json" in lines[0]

    def test_settings_come_along_and_wrong_ones_are_named(self, chat, tmp_path):
        pair = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        file = tmp_path / "x.json"
        file.write_text(json.dumps({"messages": pair, "settings": {"max-new-tokens": 2, "budget": 99}}))
        code, out, err = chat(f"/load {file}", "one", options=JSON)
        assert json.loads(out)["turns"][0]["new_tokens"] == 2
        assert "max-new-tokens 2" in err and "it was made with budget 99, which is not taken over" in err
        file.write_text(json.dumps({"messages": pair, "settings": {"temperature": "hot"}}))
        code, out, err = chat(f"/load {file}", "one", options=JSON)
        assert code == 0 and f"{file}: temperature hot: " in err
