"""What a training reads: each token once an epoch, borders between documents, the same after a crash."""

import gzip
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from tiny_text import CHATML, byte_tokenizer
from trimkv.train.chat import chat_tokens
from trimkv.train.data import PackedTexts, Source, collate

SHARED = Path(__file__).parents[3] / "shared" / "data"

# As Qwen3's: thinking is taken out of all turns but the last, where an empty thought stands in for a missing one.
STRIPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.reasoning_content if m.reasoning_content is defined else "
    "(m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '') %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ answer if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama's older ones: the mark in the template, content trimmed, no text between prompt and answer but a space.
INST = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}<|im_end|>"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
CHAT = (
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Four?"},
    {"role": "assistant", "content": "Yes, four. "},
)


def write(path, *records):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def letters(count, size, first="a"):
    """Documents that can be told apart: a run of one letter each."""
    return [{"text": chr(ord(first) + i) * size} for i in range(count)]


def decode(tokenizer, sample, name="input_ids"):
    return tokenizer.decode(sample[name][sample[name] >= 0])


def documents(sample):
    """[(begin, end)] by ``start``."""
    begins = [i for i, s in enumerate(sample["start"].tolist()) if s == i and sample["mask"][i]]
    ends = [*begins[1:], int(sample["mask"].sum())]
    return list(zip(begins, ends, strict=True))


def test_short_documents_share_a_sample_and_keep_their_borders(tmp_path):
    tokenizer = byte_tokenizer()
    data = PackedTexts([write(tmp_path / "a.jsonl", *letters(7, 5))], tokenizer, 8)
    seen = ""
    for sample in data:
        assert {name: t.shape for name, t in sample.items()} == dict.fromkeys(
            ("input_ids", "labels", "start", "mask"), (8,)
        )
        for begin, end in documents(sample):
            text = tokenizer.decode(sample["input_ids"][begin:end])
            assert len(set(text)) == 1, "two documents in one"
            assert (sample["start"][begin:end] == begin).all()
            assert sample["labels"][begin] == -100, "nothing in a document predicts its first token"
            assert torch.equal(sample["labels"][begin + 1 : end], sample["input_ids"][begin + 1 : end])
            seen += text
    assert sorted(seen) == sorted("abcdefg" * 5)
    assert len(data) == 5  # 35 tokens in samples of 8


def test_padding_is_masked_unlabelled_and_alone(tmp_path):
    tokenizer = byte_tokenizer()
    data = PackedTexts([write(tmp_path / "a.jsonl", *letters(3, 5))], tokenizer, 8, pack=False)
    assert len(data) == 3
    for sample in data:
        assert sample["mask"].tolist() == [True] * 5 + [False] * 3
        assert sample["input_ids"][5:].tolist() == [tokenizer.pad_token_id] * 3
        assert sample["labels"][5:].tolist() == [-100] * 3
        assert sample["start"].tolist() == [0] * 5 + [5, 6, 7]


@pytest.mark.parametrize("bos", [False, True])
def test_long_documents_are_cut_into_whole_samples(tmp_path, bos):
    tokenizer = byte_tokenizer(bos=bos)
    text = "".join(chr(97 + i % 26) for i in range(50))
    data = PackedTexts([write(tmp_path / "a.jsonl", {"text": text})], tokenizer, 16, seed=3)
    length = 15 if bos else 16
    pieces = sorted(decode(tokenizer, s)[3 * bos :] for s in data if s["mask"].all())
    assert pieces == sorted(text[i : i + length] for i in range(0, 50 - length, length))
    for sample in data:
        assert (sample["input_ids"][0] == tokenizer.bos_token_id) == bos
        assert sample["start"][sample["mask"]].tolist() == [0] * int(sample["mask"].sum())
        assert sample["labels"][0] == -100 and sample["labels"][1] == sample["input_ids"][1]


def test_without_borders_short_records_become_one_long_context(tmp_path):
    tokenizer = byte_tokenizer()
    path = write(tmp_path / "a.jsonl", *letters(6, 5))
    data = PackedTexts([Source(path, borders=False)], tokenizer, 10)
    texts = {decode(tokenizer, sample) for sample in data if sample["mask"].all()}
    whole = "\n\n".join(c * 5 for c in "abcdef")
    assert texts == {whole[i : i + 10] for i in range(0, 40, 10)}
    assert all(not sample["start"][sample["mask"]].any() for sample in data)


def test_a_sample_depends_on_seed_and_number_alone(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", *letters(20, 9))
    make = lambda seed, **options: PackedTexts([path], byte_tokenizer(), 16, seed=seed, **options)  # noqa: E731
    data, again = make(1, samples=40), make(1, samples=60)
    for i in (39, 3, 17):  # asked for in any order, of a longer training too
        assert all(torch.equal(data[i][name], again[i][name]) for name in data[i])
    first, other = ([s["input_ids"].tolist() for s in make(seed)] for seed in (1, 2))
    assert sorted(first) != first and first != other
    epochs = [[data[i]["input_ids"].tolist() for i in range(k, k + len(make(1)))] for k in (0, len(make(1)))]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    with pytest.raises(IndexError):
        data[40]


def test_sources_are_mixed_by_weight_at_every_moment(tmp_path):
    tokenizer = byte_tokenizer()
    paths = [
        write(tmp_path / f"{i}.jsonl", *letters(1, size, c)) for i, (c, size) in enumerate([("a", 400), ("b", 40)])
    ]
    data = PackedTexts([Source(p, w) for p, w in zip(paths, (0.25, 0.75), strict=True)], tokenizer, 10, samples=40)
    kinds = [decode(tokenizer, sample)[0] for sample in data]
    assert all(kinds[i : i + 4].count("a") == 1 for i in range(0, 40, 4))
    each_once = PackedTexts(paths, tokenizer, 10)
    assert len(each_once) == 44
    assert sum(decode(tokenizer, sample)[0] == "a" for sample in each_once) == 40


def test_a_selection_of_tokens_is_spread_over_the_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("trimkv.train.corpus.PIECE", 50)
    path, reports = write(tmp_path / "a.jsonl", *letters(20, 1000)), []
    make = lambda: PackedTexts(  # noqa: E731
        [Source(path, max_tokens=4000)], byte_tokenizer(), 50, progress=lambda *report: reports.append(report)
    )
    data = make()
    assert not reports, "tokenised at the first use"
    assert data.num_tokens == [4000]
    assert reports[-1] == (str(path), 4000)
    letters_seen = {decode(byte_tokenizer(), sample)[0] for sample in data}
    assert len(letters_seen) > 15
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(data, make(), strict=True))


def test_selecting_everything_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("trimkv.train.corpus.PIECE", 50)
    path = write(tmp_path / "a.jsonl", *({"text": f"Words of text number {i}. " * 9} for i in range(5)))
    whole, limited = (PackedTexts([Source(path, max_tokens=n)], byte_tokenizer(), 64) for n in (None, 10**6))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(whole, limited, strict=True))


def responses(tokenizer, messages):
    ids, learn = chat_tokens(tokenizer, messages)
    runs, previous = [], False
    for token, is_response in zip(ids, learn, strict=True):
        if is_response and not previous:
            runs.append([])
        if is_response:
            runs[-1].append(int(token))
        previous = bool(is_response)
    return tokenizer.decode(ids), [tokenizer.decode(run) for run in runs]


def test_responses_end_with_their_end_of_turn():
    tokenizer = byte_tokenizer()
    text, learnt = responses(tokenizer, [{"role": "system", "content": "Be brief."}, *CHAT])
    assert learnt == ["Four.<|im_end|>", "Yes, four.<|im_end|>"]
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo and two?<|im_end|>\n")
    assert text.endswith("<|im_start|>assistant\nYes, four.<|im_end|>\n")


def test_thinking_is_kept_in_every_turn_even_where_the_template_strips_it():
    tokenizer = byte_tokenizer(STRIPS_THOUGHTS)
    thought = {"role": "assistant", "content": "<think>\n2 + 2\n</think>\n\nFour."}
    apart = {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2\n"}
    for answer in (thought, apart):
        text, learnt = responses(tokenizer, [CHAT[0], answer, CHAT[2], answer])
        assert learnt == ["<think>\n2 + 2\n</think>\n\nFour.<|im_end|>"] * 2
        assert text.count("<think>") == 2
    text, learnt = responses(tokenizer, CHAT)
    assert learnt == ["Four.<|im_end|>", "<think>\n\n</think>\n\nYes, four.<|im_end|>"]
    assert text == tokenizer.apply_chat_template(list(CHAT), tokenize=False).replace("four. <", "four.<")


def test_templates_without_a_generation_prompt():
    text, learnt = responses(byte_tokenizer(INST), CHAT)
    assert [answer.strip() for answer in learnt] == ["Four.<|im_end|>", "Yes, four.<|im_end|>"]
    assert text == "<s>[INST] Two and two? [/INST] Four.<|im_end|>[INST] Four? [/INST] Yes, four.<|im_end|>"


def test_an_assistant_may_speak_first_and_a_user_last():
    _, learnt = responses(byte_tokenizer(), [CHAT[1], CHAT[2]])
    assert learnt == ["Four.<|im_end|>"]
    assert responses(byte_tokenizer(), [CHAT[0]])[1] == []


@pytest.mark.parametrize("response_only", [True, False])
def test_only_responses_are_labelled_if_asked(tmp_path, response_only):
    tokenizer = byte_tokenizer()
    path = write(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": CHAT[:2]})
    data = PackedTexts([path], tokenizer, 120, pack=False, response_only=response_only)
    labelled = sorted(decode(tokenizer, sample, "labels") for sample in data)
    if response_only:
        assert labelled == ["Four.<|im_end|>", "Four.<|im_end|>Yes, four.<|im_end|>"]
    else:
        assert all(text.startswith("user\nTwo and two?") for text in labelled)


def test_samples_without_a_response_are_left_out_and_texts_are_learnt_whole(tmp_path):
    tokenizer = byte_tokenizer()
    chat = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "x" * 200}, CHAT[1]]})
    data = PackedTexts([chat], tokenizer, 32, response_only=True)
    assert all((sample["labels"] >= 0).any() for sample in data) and len(data) <= 2
    text = write(tmp_path / "b.jsonl", *letters(1, 40))
    sample = PackedTexts([text], tokenizer, 32, response_only=True)[0]
    assert (sample["labels"] >= 0).sum() in (31, 7)


def test_a_mark_that_the_template_writes_is_not_doubled(tmp_path):
    tokenizer = byte_tokenizer("<s>" + CHATML, bos=True)
    sample = PackedTexts([write(tmp_path / "a.jsonl", {"messages": CHAT})], tokenizer, 200, pack=False)[0]
    assert sample["input_ids"][:3].tolist() == [1, 2, *tokenizer("u", add_special_tokens=False).input_ids]


def test_batches_are_stacked(tmp_path):
    data = PackedTexts([write(tmp_path / "a.jsonl", *letters(8, 9))], byte_tokenizer(), 16)
    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=collate, num_workers=0)
    batch = next(iter(loader))
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "input_ids": ((2, 16), torch.int64),
        "labels": ((2, 16), torch.int64),
        "start": ((2, 16), torch.int64),
        "mask": ((2, 16), torch.bool),
    }


def test_what_cannot_be_trained_on_is_said_in_one_line(tmp_path):
    tokenizer = byte_tokenizer()
    text, chat = write(tmp_path / "a.jsonl", *letters(3, 5)), write(tmp_path / "b.jsonl", {"messages": CHAT})
    question = write(tmp_path / "c.jsonl", {"messages": CHAT[:1]})
    cases = [
        (lambda: PackedTexts([], tokenizer, 8), "no data"),
        (lambda: PackedTexts([text], tokenizer, 1), "at least 2"),
        (lambda: PackedTexts([Source(text, 0.5), text], tokenizer, 8), "every source a weight"),
        (lambda: PackedTexts([Source(text, 0.0)], tokenizer, 8), "not all zero"),
        (lambda: PackedTexts([text], tokenizer, 64)[0], r"a.jsonl: 15 tokens are too few for one sample of 64"),
        (lambda: PackedTexts([tmp_path / "none.txt"], tokenizer, 8)[0], "none.txt: cannot be read"),
        (lambda: PackedTexts([chat], byte_tokenizer(None), 8)[0], "b.jsonl, line 1: messages need a model that has"),
        (
            lambda: PackedTexts([question], tokenizer, 8, response_only=True)[0],
            "c.jsonl: nothing to learn",
        ),
        (
            lambda: PackedTexts(
                [write(tmp_path / "d.jsonl", {"messages": [{"role": "tool", "content": "x"}]})], byte_tokenizer(INST), 8
            )[0],
            "d.jsonl, line 1: the chat template refuses it .no tool.",
        ),
        (lambda: PackedTexts(["hub:no spaces/x y"], tokenizer, 8)[0], "expected hub:org/name"),
    ]
    for broken, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            broken()
        assert "\n" not in str(error.value)


def test_hub_datasets_without_the_package_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in ("hub:org/name@abc:train", "org/name"):
        with pytest.raises(ValueError, match=r"-m pip install -e .*\[train\]"):
            PackedTexts([path], byte_tokenizer(), 8)[0]


def test_hub_datasets_are_streamed_no_further_than_needed(monkeypatch):
    asked, read = [], []

    def load_dataset(*args, **options):
        asked.append((args, options))
        for i in range(1000):
            read.append(i)
            yield {"answer": "a" * 30, "turns": list(CHAT)} if "chat" in args[0] else {"text": "b" * 30}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = Source("hub:org/name/part@abc123:test:answer", max_tokens=100)
    with pytest.raises(ValueError, match="org/name@abc123:test, record 1: no field answer; there are text"):
        PackedTexts([source], byte_tokenizer(), 8)[0]
    data = PackedTexts([Source("org/name@abc123", max_tokens=100)], byte_tokenizer(), 8)
    read.clear()
    assert decode(byte_tokenizer(), data[0]) == "b" * 8 and data.num_tokens == [100]
    assert len(read) <= 5
    assert asked[0] == (("org/name", "part"), {"revision": "abc123", "split": "test", "streaming": True})
    assert asked[1] == (("org/name", None), {"revision": "abc123", "split": "train", "streaming": True})
    chats = Source("hub:org/chat@1:train:turns", max_tokens=1000)
    sample = PackedTexts([chats], byte_tokenizer(), 500, response_only=True)[0]
    assert decode(byte_tokenizer(), sample, "labels").startswith("Four.<|im_end|>")


@pytest.mark.parametrize("name", ["gsm8k/train.jsonl.gz", "math/math_test_minus_math500.jsonl.gz"])
def test_real_files_give_full_samples(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not at hand")
    data = PackedTexts([Source(SHARED / name, max_tokens=20_000)], byte_tokenizer(), 2048)
    assert len(data) == 10 and data.num_tokens == [20_000]
    assert sum(int(sample["mask"].sum()) for sample in data) == 20_000
