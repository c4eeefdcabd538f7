"""What reaches a measurement from the user's files, and what is said about files that can't be read."""

import gzip
import json

import pytest

from tiny_text import byte_tokenizer
from trimkv.texts import file_windows, read_texts, windows


def write(path, *records):
    """A .jsonl file, gzipped if it is called so."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def test_every_known_record_is_read_with_its_place(tmp_path):
    (tmp_path / "a.txt").write_text("plain\nwords\n", encoding="utf-8-sig")
    (tmp_path / "b.TXT.gz").write_bytes(gzip.compress("gezippt: ä".encode()))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    write(
        tmp_path / "c.jsonl.gz",
        {"text": "one", "id": 7},
        {"messages": messages},
        {"question": "1+1?", "answer": 2},
        {"text": "  "},
        {"problem": "p", "solution": "s", "answer": "a"},
    )
    found = list(read_texts([tmp_path / "a.txt", tmp_path / "b.TXT.gz", str(tmp_path / "c.jsonl.gz")]))
    assert [t.text for t in found] == ["plain\nwords\n", "gezippt: ä", "one", None, "1+1?\n\n2", "p\n\ns"]
    assert found[3].messages == tuple(messages)
    assert [t.index for t in found] == [1, 1, 1, 2, 3, 5]
    assert found[-1].source == str(tmp_path / "c.jsonl.gz")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": "broken\n', ["line 2", "not valid JSON"]),
        ("a.jsonl", b"[1, 2]\n", ["line 1", "expected a JSON object"]),
        ("a.jsonl", b'{"body": "x"}\n', ["line 1", "no known fields", "question + answer"]),
        ("a.jsonl", b'{"text": 3}\n', ["line 1", "field text must be a string"]),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', ["line 1", "content of a message"]),
        ("a.jsonl", b'{"messages": "hello"}\n', ["line 1", "messages must be a list"]),
        ("a.jsonl", b'{"question": "q", "answer": null}\n', ["line 1", "field answer"]),
        ("a.jsonl", b'{"text": "\\ud800"}\n', ["line 1", "not valid Unicode"]),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "gr\xfcn"}\n', ["line 2", "not UTF-8"]),
        ("a.jsonl", b"\n\n", ["empty"]),
        ("a.jsonl", b'{"a":' * 100_000, ["line 1", "nested too deeply"]),
        ("a.txt", b"", ["empty"]),
        ("a.txt", b"ok\n\x00\x01", ["line 2", "binary"]),
        ("a.txt", b"\x89PNG\r\n", ["line 1", "not UTF-8"]),
        ("a.txt", "some words".encode("utf-16"), ["a.txt: UTF-16 text; save it as UTF-8"]),
        ("a.txt", b"\xfe\xff\0a", ["a.txt: UTF-16 text; save it as UTF-8"]),
        ("a.txt", "some words\nand \u2019 more".encode("utf-16-le"), ["a.txt: UTF-16 text; save it as UTF-8"]),
        ("a.txt", "some words\nand \u2019 more".encode("utf-16-be"), ["a.txt: UTF-16 text; save it as UTF-8"]),
        ("a.txt", "some words".encode("utf-32"), ["a.txt: UTF-32 text; save it as UTF-8"]),
        (
            "a.jsonl.gz",
            gzip.compress('{"text": "x"}'.encode("utf-16"), mtime=0),
            ["a.jsonl.gz: UTF-16 text; save it as UTF-8"],
        ),
        ("a.txt", bytes([1, 0, 2, 0, 3, 0]), ["line 1", "binary"]),
        ("a.txt.gz", b"not gzipped", ["not a readable gzip file"]),
        ("a.txt.gz", gzip.compress(b"cut short " * 1000, mtime=0)[:40], ["not a readable gzip file"]),
        ("a.pdf", b"%PDF", ["unknown kind of file", ".jsonl"]),
    ],
)
def test_an_unusable_file_is_named_in_one_line(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(read_texts([path]))
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    for fragment in said:
        assert fragment in message


def test_missing_files_and_folders_are_named(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name in ("nothing.txt", "folder.txt"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            list(read_texts([tmp_path / name]))


def test_a_long_text_is_cut_without_gap_or_overlap(tmp_path):
    text = " ".join(f"word{i}" for i in range(5000))
    (tmp_path / "long.txt").write_text(text)
    tokenizer = byte_tokenizer()
    found = list(windows(read_texts([tmp_path / "long.txt"]), tokenizer, 100))
    assert all(len(window) == 100 for window in found)
    assert len(found) == len(text) // 100
    assert "".join(map(tokenizer.decode, found)) == text[: 100 * len(found)]


def test_documents_take_turns(tmp_path):
    write(tmp_path / "three.jsonl", {"text": "a" * 40}, {"text": "b" * 20}, {"text": "c" * 30})
    decode = byte_tokenizer().decode
    found = [decode(w) for w in windows(read_texts([tmp_path / "three.jsonl"]), byte_tokenizer(), 10)]
    assert "".join(window[0] for window in found) == "abcabcaca"
    assert [decode(w) for w in windows(read_texts([tmp_path / "three.jsonl"]), byte_tokenizer(), 10, 4)] == found[:4]


def test_files_take_turns_however_long_their_records(tmp_path):
    """Eight sequences from a novel and a set of questions must not all be of the novel."""
    (tmp_path / "novel.txt").write_text("n" * 10_000)
    write(tmp_path / "questions.jsonl", *({"question": "q" * 30, "answer": "r" * 8} for _ in range(50)))
    paths = [tmp_path / "novel.txt", tmp_path / "questions.jsonl"]
    found = [byte_tokenizer().decode(w) for w in file_windows(paths, byte_tokenizer(), 100, 6)]
    assert [window[0] for window in found] == ["n", "q", "n", "q", "n", "q"]


def test_short_records_are_packed_with_blank_lines_between(tmp_path):
    write(tmp_path / "qa.jsonl", *({"question": f"question {i}?", "answer": f"answer {i}"} for i in range(10, 30)))
    found = [byte_tokenizer().decode(w) for w in windows(read_texts([tmp_path / "qa.jsonl"]), byte_tokenizer(), 60)]
    assert len(found) >= 5
    assert found[0] == "question 10?\n\nanswer 10\n\nquestion 11?\n\nanswer 11\n\nquestion 12?"[:60]
    assert all(window.startswith("question ") and len(window) == 60 for window in found)
    assert len(set(found)) == len(found)


def test_short_files_are_packed_together(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(name * 20)
    paths = [tmp_path / f"{name}.txt" for name in "abcd"]
    found = [byte_tokenizer().decode(w) for w in file_windows(paths, byte_tokenizer(), 50)]
    assert found == ["a" * 20 + "\n\n" + "b" * 20 + "\n\n" + "c" * 6]


def test_messages_go_through_the_chat_template(tmp_path):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x" * 50}]
    path = write(tmp_path / "chat.jsonl", {"messages": messages})
    window = next(windows(read_texts([path]), byte_tokenizer(), 20))
    assert byte_tokenizer().decode(window) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assist"
    with pytest.raises(ValueError, match="line 1: messages need a model that has a chat template"):
        list(windows(read_texts([path]), byte_tokenizer(chat_template=None), 20))
    refusing = byte_tokenizer(chat_template="{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(ValueError, match=r"line 1: the chat template refuses it \(roles must alternate\)"):
        list(windows(read_texts([path]), refusing, 20))


def test_every_window_begins_with_the_mark_that_the_model_was_trained_with(tmp_path):
    """Llama-like models lose their attention sink without it, and every policy would look worse than it is."""
    (tmp_path / "long.txt").write_text("a" * 50)
    found = list(windows(read_texts([tmp_path / "long.txt"]), byte_tokenizer(bos=True), 10))
    assert [window[0] for window in found] == [1] * 5
    assert all(len(window) == 10 and 1 not in window[1:] for window in found)
    marked = byte_tokenizer(chat_template="<s>{{ messages[0]['content'] }}", bos=True)
    path = write(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "y" * 30}]})
    assert [w.count(1) for w in windows(read_texts([path]), marked, 10)] == [1, 1, 1]


def test_few_windows_of_a_large_file_cost_little(tmp_path):
    """Nobody waits for 5 MB to be tokenised to get two windows."""

    class Counting:
        def __init__(self):
            self.tokenizer, self.characters = byte_tokenizer(), 0

        def __call__(self, text, **options):
            self.characters += len(text)
            return self.tokenizer(text, **options)

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

    write(tmp_path / "big.jsonl", *({"text": f"{i} " + "some words " * 50_000} for i in range(10)))
    counting = Counting()
    found = list(windows(read_texts([tmp_path / "big.jsonl"]), counting, 64, 2))
    assert len(found) == 2 and found[0] != found[1]
    assert counting.characters < 20_000


def test_impossible_context():
    with pytest.raises(ValueError, match="context must be at least 2"):
        list(windows([], byte_tokenizer(), 1))
