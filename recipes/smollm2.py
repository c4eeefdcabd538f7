"""The gates that ship for smollm2: decayed attention, then soft eviction, then soft eviction on their own answers.

    python recipes/smollm2.py prepare --source DATA --output texts     # novels, GSM8K and MATH -> training texts
    python recipes/smollm2.py answer --data texts                      # the model answers prompts made of them
    python recipes/smollm2.py train --data texts --output gates        # two stages on one GPU: 8 minutes
    python recipes/smollm2.py answer --data texts --gates gates/eviction      # answers from a bounded cache
    python recipes/smollm2.py polish --data texts --gates gates/eviction --output gates    # the third stage

DATA holds novels/train.jsonl.gz (public-domain novels, records with author and text), gsm8k/train.jsonl.gz (GSM8K's
training set) and math/math_test_minus_math500.jsonl.gz (MATH problems with solutions, none of MATH-500). Nothing that
is measured on is read: three authors and the last 400 GSM8K problems are put aside as dev_* files, to choose settings.
"""

import argparse
import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

from trimkv.train.config import GateConfig
from trimkv.train.data import PackedTexts, Source

HELD_OUT_AUTHORS = ("Ward", "Wcollins", "Woolf")
SHARED = {"batch_size": 8, "intermediate_size": 160, "checkpointing": False, "cuda_graph": True, "compile": True}
ASK = (
    "Continue the story:\n\n{}",
    "Here is a passage from a novel.\n\n{}\n\nWhat happens next?",
    "Please write the next part of this text.\n\n{}",
    "{}\n\nGo on from here.",
)


TASKS = (
    "Summarize the following text in a few sentences.\n\n{}",
    "{}\n\nSummarize this in three sentences.",
    "What is this passage about?\n\n{}",
    "Read the passage and list its main events.\n\n{}",
    "{}\n\nWho are the people in this passage, and what do they want?",
    "Continue this story with one more paragraph.\n\n{}",
    "Rewrite the following text in simple modern English.\n\n{}",
    "Write a short and polite letter that answers this one.\n\n{}",
    "Give this passage a title and explain your choice.\n\n{}",
    "{}\n\nWhere does this happen, and when? Explain how you know.",
    "I am reading this passage and need some advice: what should the people in it do next?\n\n{}",
    "Write five questions that a teacher could ask about this text.\n\n{}",
    "Turn the following passage into a short dialogue.\n\n{}",
    "{}\n\nWhat is the mood of this text? Answer in one paragraph.",
    "Please write a short email to a friend about what happens here.\n\n{}",
)


def decay() -> GateConfig:
    """First stage: the paper's loss, with a small budget and a strong capacity loss."""
    return GateConfig(budget=24, capacity_weight=4.0, steps=300, **SHARED)


def eviction() -> GateConfig:
    """Second stage: the forward pass evicts, softly, at budgets of 48 to 640 tokens."""
    return GateConfig(
        budget=24,
        capacity_weight=0.5,
        stage="eviction",
        steps=1400,
        learning_rate=2e-3,
        bias_learning_rate=2e-2,
        temperatures=(0.4, 0.03),
        seed=1,
        **SHARED,
    )


def own_answers() -> GateConfig:
    """Third stage: answers that the model wrote with these gates and few slots, judged by the model with all tokens.

    What goes wrong in an answer begins with small errors that no text of the full model ever shows.
    """
    return replace(eviction(), steps=600, learning_rate=1e-3, bias_learning_rate=1e-2, temperatures=(0.1, 0.03), seed=2)


def sources(folder: Path) -> list[Source]:
    """What is read, with shares. Short records follow one another in one context, as long contexts are the point."""
    return [
        Source(folder / "novels.jsonl.gz", 0.4),
        Source(folder / "gsm8k.jsonl.gz", 0.15, borders=False),
        Source(folder / "math.jsonl.gz", 0.1, borders=False),
        Source(folder / "chat.jsonl.gz", 0.15),
        Source(folder / "answers.jsonl.gz", 0.2),
    ]


def own_sources(folder: Path) -> list[Source]:
    """Of the third stage; of conversations only the answers count."""
    return [
        Source(folder / "novels.jsonl.gz", 0.2),
        Source(folder / "gsm8k.jsonl.gz", 0.1, borders=False),
        Source(folder / "math.jsonl.gz", 0.05, borders=False),
        Source(folder / "chat.jsonl.gz", 0.05),
        Source(folder / "answers.jsonl.gz", 0.2),
        Source(folder / "bounded_answers.jsonl.gz", 0.4),
    ]


TEXTS = "49 public-domain novels, GSM8K train, MATH without MATH-500, chats made of them, the model's own answers"


def train_stages(stages, model_name: str = "smollm2", gates: Path | None = None) -> None:
    """Trains one stage after the other; each begins with the gates of the one before.

    Args:
        stages: (config, sources, whether of conversations only the responses count, folder to write) of each.
        gates: folder of gates that the first begins with; None begins anew.
    """
    import torch

    from trimkv import embedded
    from trimkv.gates.files import load_gates
    from trimkv.train.trainer import train

    model, tokenizer = _load(model_name)
    meta = {"data": TEXTS, "base_model": "smollm2", "base_sha256": embedded.weights_sha256()}
    torch.set_float32_matmul_precision("high")  # the gates are fp32
    for config, texts, response_only, output in stages:
        dataset = PackedTexts(
            texts,
            tokenizer,
            config.context,
            seed=config.seed,
            response_only=response_only,
            samples=config.steps * config.batch_size * config.accumulation,
        )
        start = None if gates is None else load_gates(gates)
        result = train(model, dataset, config, output, start, meta=meta, callbacks=[_printer()])
        history = result.pop("history")
        print(json.dumps({**result, "last": history[-1]}), flush=True)
        gates = output


def _load(model_name: str):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimkv import embedded

    place = embedded.resolve(model_name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(place, dtype=dtype).to(device), tokenizer


def _printer():
    from transformers import TrainerCallback

    class Print(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.global_step % 30 == 0 and "kl" in logs:
                shown = {k: round(logs[k], 5) for k in ("kl", "capacity", "occupancy", "grad_norm")}
                print(state.global_step, shown, flush=True)

    return Print()


def prepare(source: Path, output: Path) -> None:
    """Writes novels, gsm8k, math, chat and prompts, and dev_novels and dev_gsm8k to choose settings by."""
    draw = random.Random(0)
    novels = list(_read(source / "novels" / "train.jsonl.gz"))
    problems = list(_read(source / "gsm8k" / "train.jsonl.gz"))
    maths = list(_read(source / "math" / "math_test_minus_math500.jsonl.gz"))
    held = [novel for novel in novels if novel["author"] in HELD_OUT_AUTHORS]
    novels = [novel for novel in novels if novel["author"] not in HELD_OUT_AUTHORS]
    problems, held_problems = problems[:-400], problems[-400:]
    excerpts = []
    for novel in novels:
        start = draw.randrange(max(1, len(novel["text"]) - 400_000))
        excerpts.append({"text": novel["text"][start : start + 400_000]})
    _write(output / "novels.jsonl.gz", excerpts)
    _write(output / "dev_novels.jsonl.gz", [{"text": novel["text"][100_000:200_000]} for novel in held])
    _write(output / "gsm8k.jsonl.gz", [{k: p[k] for k in ("question", "answer")} for p in problems])
    _write(output / "dev_gsm8k.jsonl.gz", [{k: p[k] for k in ("question", "answer")} for p in held_problems])
    _write(output / "math.jsonl.gz", [{k: p[k] for k in ("problem", "solution")} for p in maths])
    turns = [(p["question"], p["answer"]) for p in draw.sample(problems, 3500)]
    turns += [(p["problem"], p["solution"]) for p in draw.sample(maths, 1800)]
    for novel in novels:
        for _ in range(14):
            size = draw.choice((600, 1500, 3000, 6000))
            start = draw.randrange(len(novel["text"]) - size - 2000)
            text = novel["text"][start : start + size + 1200]
            turns.append((draw.choice(ASK).format(text[:size].strip()), text[size:].strip()))
    draw.shuffle(turns)
    _write(output / "chat.jsonl.gz", _conversations(turns))
    prompts = [{"prompt": p["question"]} for p in draw.sample(problems, 160)]
    for novel in novels:
        for _ in range(30):
            size = draw.choice((600, 1000, 1500, 2500, 4000))
            start = draw.randrange(len(novel["text"]) - size)
            prompts.append({"prompt": draw.choice(TASKS).format(novel["text"][start : start + size].strip())})
    _write(output / "prompts.jsonl.gz", prompts)


BUDGETS = (64, 96, 128, 192)  # of answers from a bounded cache, each for a quarter of the prompts


def answer(data: Path, model_name: str = "smollm2", gates: Path | None = None, new_tokens: int = 200) -> None:
    """Answers the prompts of prompts.jsonl.gz, so that gates see the texts that they will work on.

    Writes answers.jsonl.gz, sampled with the full cache; with ``gates`` bounded_answers.jsonl.gz, written with few
    slots, half of it sampled and half greedy.
    """
    import torch

    import trimkv

    model, tokenizer = _load(model_name)
    prompts = sorted((record["prompt"] for record in _read(data / "prompts.jsonl.gz")), key=len)
    torch.manual_seed(0)
    if gates is not None:
        trimkv.attach(model, gates)
        batches = [(prompts[i :: len(BUDGETS)], budget) for i, budget in enumerate(BUDGETS)]
    else:
        batches = [(prompts[start : start + 128], None) for start in range(0, len(prompts), 128)]
    turns = []
    for number, (some, budget) in enumerate(batches):
        chats = [[{"role": "user", "content": prompt}] for prompt in some]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        how = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0}
        if budget is not None:
            how = {} if number % 2 else how
            how["past_key_values"] = trimkv.bounded_cache(model, "trimkv", budget, chunk=512)
        out = model.generate(**inputs, max_new_tokens=new_tokens, **{"do_sample": False, **how})
        texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        turns += [(prompt, text.strip()) for prompt, text in zip(some, texts, strict=True) if text.strip()]
    random.Random(0).shuffle(turns)
    name = "answers.jsonl.gz" if gates is None else "bounded_answers.jsonl.gz"
    _write(data / name, _conversations(turns, characters=5000))


def _conversations(turns: list[tuple[str, str]], characters: int = 9000):
    """Turns in a row until a conversation is longer than a training context."""
    messages, length = [], 0
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        length += len(question) + len(answer)
        if length > characters:
            yield {"messages": messages}
            messages, length = [], 0


def _read(path: Path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _write(path: Path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    makers = {name: commands.add_parser(name) for name in ("prepare", "answer", "train", "polish")}
    makers["prepare"].add_argument("--source", type=Path, required=True)
    for name, command in makers.items():
        if name != "answer":
            command.add_argument("--output", type=Path, required=True)
        if name != "prepare":
            command.add_argument("--data", type=Path, required=True)
            command.add_argument("--model", default="smollm2", help="alias or folder")
    makers["answer"].add_argument("--gates", type=Path, help="answer with these and a bounded cache")
    makers["polish"].add_argument("--gates", type=Path, required=True, help="those of the second stage")
    makers["train"].add_argument("--steps", type=int, nargs=2, help="of the two stages")
    makers["polish"].add_argument("--steps", type=int)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.source, args.output)
    elif args.command == "answer":
        answer(args.data, args.model, args.gates)
    elif args.command == "train":
        first, second = decay(), eviction()
        if args.steps:
            first, second = replace(first, steps=args.steps[0]), replace(second, steps=args.steps[1])
        texts = sources(args.data)
        stages = [(first, texts, False, args.output / "decay"), (second, texts, False, args.output / "eviction")]
        train_stages(stages, args.model)
    else:
        config = replace(own_answers(), steps=args.steps or own_answers().steps)
        stage = config, own_sources(args.data), True, args.output / "own_answers"
        train_stages([stage], args.model, args.gates)


if __name__ == "__main__":
    main()
