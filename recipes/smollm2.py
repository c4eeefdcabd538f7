"""The gates that ship for smollm2: decayed attention first, then soft eviction at drawn budgets, then on longer texts,
then with more slots for some layers than for others.

    python recipes/smollm2.py prepare --source DATA --output texts     # novels, GSM8K and MATH -> training texts
    python recipes/smollm2.py answer --data texts                      # the model answers prompts made of them
    python recipes/smollm2.py train --data texts --output gates        # all stages on one GPU: quarter of an hour
    python recipes/smollm2.py train --data texts --output gates --only shared --gates gates/longer      # the last one

DATA holds novels/train.jsonl.gz (public-domain novels, records with author and text), gsm8k/train.jsonl.gz (GSM8K's
training set) and math/math_test_minus_math500.jsonl.gz (MATH problems with solutions, none of MATH-500). Nothing that
is measured on is read: three authors and the last 400 GSM8K problems are put aside as dev_* files, to choose settings.
"""

import argparse
import gzip
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

from trimkv.train import run_folder
from trimkv.train.config import GateConfig
from trimkv.train.data import PackedTexts, Source

HELD_OUT_AUTHORS = ("Ward", "Wcollins", "Woolf")
SHARED = {"batch_size": 8, "intermediate_size": 160, "checkpointing": False, "cuda_graph": True, "compile": True}
MEASURED_AT, GOOD_FOR = (48, 128, 320, 800), (64, 128, 256, 512)  # slots per head
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


def longer() -> GateConfig:
    """Third stage: the second one on texts of 4,096 tokens, at budgets of 64 to 1,024, colder."""
    return replace(
        eviction(),
        context=4096,
        batch_size=4,
        steps=700,
        learning_rate=1e-3,
        bias_learning_rate=1e-2,
        temperatures=(0.1, 0.03),
        budgets=(64, 1024),
        budget_power=1.0,
        seed=3,
    )


def shared() -> GateConfig:
    """Fourth stage: layers have what ``measure_shares`` gives them, and texts are of 8,192 tokens."""
    return replace(longer(), context=8192, batch_size=2, steps=500, temperatures=(0.1, 0.02), seed=5)


STAGES = {"decay": decay, "eviction": eviction, "longer": longer, "shared": shared}
SHARED_STAGE = "shared"  # before it layers get their shares


def sources(folder: Path) -> list[Source]:
    """What is read, with shares. Short records follow one another in one context, as long contexts are the point."""
    return [
        Source(folder / "novels.jsonl.gz", 0.4),
        Source(folder / "gsm8k.jsonl.gz", 0.15, borders=False),
        Source(folder / "math.jsonl.gz", 0.1, borders=False),
        Source(folder / "chat.jsonl.gz", 0.15),
        Source(folder / "answers.jsonl.gz", 0.2),
    ]


def measure_shares(
    data: Path, gates, model_name: str = "smollm2", windows: int = 4, context: int = 4096
) -> list[float]:
    """What share of the budget each layer should have with these gates, by the beginnings of some training novels:
    ``trimkv shares`` in Python."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import trimkv
    from trimkv import embedded
    from trimkv.eval.layer_shares import layer_costs, share_out
    from trimkv.texts import file_windows

    place = embedded.resolve(model_name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).to(device)
    model.config._name_or_path = "smollm2"
    trimkv.attach(model, gates)
    ids = list(file_windows([data / "novels.jsonl.gz"], AutoTokenizer.from_pretrained(place), context, windows))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # a single layer's cost may be a millionth of a nat
    costs = layer_costs(model, torch.tensor(ids), MEASURED_AT)
    torch.set_float32_matmul_precision(precision)
    shares = share_out(costs, MEASURED_AT, GOOD_FOR)
    print(json.dumps({"layer_shares": shares, "costs": costs.tolist()}), flush=True)
    return shares


def train_all(
    data: Path,
    output: Path,
    model_name: str = "smollm2",
    steps: list[int] | None = None,
    only: str | None = None,
    gates: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Trains the stages one after the other and writes output/NAME for each.

    Args:
        steps: of each stage, in place of its own.
        only: the one stage to train.
        gates: to start from; None starts with new ones.
        overwrite: replace what the folders of the stages hold.

    Raises:
        ValueError: a stage's folder holds gates, or a training; said before the first stage begins.
    """
    for name in STAGES:
        if only in (None, name):
            run_folder.check_free(output / name, overwrite)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimkv import embedded
    from trimkv.gates.files import load_gates
    from trimkv.train.trainer import train

    place = embedded.resolve(model_name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(place)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype).to(device)
    texts = "49 public-domain novels, GSM8K train, MATH without MATH-500, chats made of them, the model's own answers"
    meta = {"data": texts}
    meta |= {"base_model": "smollm2", "base_sha256": embedded.weights_sha256()}
    torch.set_float32_matmul_precision("high")  # the gates are fp32
    gates, shown = gates and load_gates(gates), printer(30, ("kl", "capacity", "occupancy", "grad_norm"))
    for i, (name, stage) in enumerate(STAGES.items()):
        if only not in (None, name):
            continue
        config = replace(stage(), steps=steps[i]) if steps else stage()
        if name == SHARED_STAGE:
            gates.meta["layer_shares"] = measure_shares(data, gates, model_name)
        dataset = PackedTexts(
            sources(data),
            tokenizer,
            config.context,
            seed=config.seed,
            samples=config.steps * config.batch_size * config.accumulation,
        )
        folder = output / name
        result = train(model, dataset, config, folder, gates, meta=meta, callbacks=[shown], overwrite=overwrite)
        history = result.pop("history")
        print(json.dumps({"stage": name, **result, "last": history[-1]}), flush=True)
        gates = load_gates(output / name)


def printer(every: int, names: tuple[str, ...]):
    """A Trainer callback that prints these numbers every so many steps."""
    from transformers import TrainerCallback

    class Print(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.global_step % every == 0 and names[0] in logs:
                print(state.global_step, {name: round(float(logs[name]), 5) for name in names}, flush=True)

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


def answer(data: Path, model_name: str = "smollm2", batch_size: int = 128, new_tokens: int = 200) -> None:
    """Writes answers.jsonl.gz: the prompts of prompts.jsonl.gz with sampled answers of the model itself, so that gates
    see the texts that they will work on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimkv import embedded

    place = embedded.resolve(model_name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype).to(device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = sorted((record["prompt"] for record in _read(data / "prompts.jsonl.gz")), key=len)
    torch.manual_seed(0)
    turns = []
    for start in range(0, len(prompts), batch_size):
        some = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]]
        inputs = tokenizer.apply_chat_template(
            some, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(device)
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=True, temperature=0.7, top_p=0.95, top_k=0)
        texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        turns += [(turn[0]["content"], text.strip()) for turn, text in zip(some, texts, strict=True) if text.strip()]
    random.Random(0).shuffle(turns)
    _write(data / "answers.jsonl.gz", _conversations(turns, characters=5000))


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
    one = commands.add_parser("prepare")
    one.add_argument("--source", type=Path, required=True)
    three = commands.add_parser("answer")
    two = commands.add_parser("train")
    for command in (two, three):
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--model", default="smollm2", help="alias or folder")
    two.add_argument("--only", choices=STAGES, help="train this stage and no other")
    two.add_argument("--gates", type=Path, help="folder with gates to start from")
    two.add_argument("--steps", type=int, nargs=len(STAGES), help="of each stage")
    two.add_argument("--overwrite", action="store_true", help="replace the gates that --output holds")
    for command in (one, two):
        command.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.source, args.output)
        return
    if args.command == "answer":
        answer(args.data, args.model)
        return
    try:
        train_all(args.data, args.output, args.model, args.steps, args.only, args.gates, args.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
