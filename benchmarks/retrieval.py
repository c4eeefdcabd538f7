"""Can a fact still be found? Pass keys and key-value pairs in novel text, asked for after the context was compressed.

    python benchmarks/retrieval.py --text novels/valid.jsonl.gz --policies all --budgets 64,128,256,512   # one GPU

A context is a piece of a novel with paragraphs such as "The pass key is 4821." put in after random sentences. It goes
through the bounded cache in chunks, evicting after each: no query ever attends to more than budget + chunk tokens. Only
then comes the question, token by token as the answer after it, with an eviction at each: no query attends to more than
the budget. The row "full" is the reference: where it masters less than 70 %, a length says nothing about policies.

All policies and budgets read the same contexts. One context serves one pass key or four pairs, each of which is asked
for on a copy of the compressed cache. Cells that are done are kept in NAME.cells.jsonl, and a second call with the same
options goes on from there.
"""

import argparse
import json
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from record import RESULTS, save
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimkv
from trimkv import embedded
from trimkv.cache.graph import DecodeStep
from trimkv.cache.policies import POLICIES, Policy, make
from trimkv.gates.head_sets import attach_heads
from trimkv.texts import read_texts

MASTERED = 0.7
SETTINGS = ("model", "gates", "heads", "form", "samples", "chunk", "seed", "dtype", "device")
# Rare in English novels of before 1925.
NAMES = "Kevin Tanya Diego Ravi Olga Bruno Fatima Ingrid Pedro Yuki Sanjay Lola Boris Chloe Omar Zelda".split()


@dataclass(frozen=True)
class Task:
    """What is hidden in a context, and how it is asked for. The answer is begun with words of the hidden sentence."""

    hidden: str
    question: str
    begun: str
    per_context: int = 1

    def draw(self, rng: random.Random) -> list[tuple[str, str]]:
        """(name, four-digit number) of all sentences of one context, no name and no number twice."""
        numbers = rng.sample(range(1000, 10000), self.per_context)
        return [(name, str(number)) for name, number in zip(rng.sample(NAMES, self.per_context), numbers, strict=True)]


# Chosen by what the full cache finds, before any policy was looked at: numbers, said twice in their own paragraphs and
# asked for in plain text. Said only once, four pairs at 4,000 tokens were found in 27 of 40 questions instead of 32.
TASKS = {
    "passkey": Task(
        "\n\nThe pass key is {value}. Remember it. {value} is the pass key.\n\n",
        "What is the pass key?",
        "The pass key is",
    ),
    "pairs": Task(
        "\n\nThe telephone number of {name} is {value}. Remember it. {value} is the telephone number of {name}.\n\n",
        "What is the telephone number of {name}?",
        "The telephone number of {name} is",
        per_context=4,
    ),
}


@dataclass(frozen=True)
class Sample:
    """One context as token ids, and its questions: (ids of the question, the answer, how deep it lies from 0 to 1)."""

    ids: list[int]
    questions: list[tuple[list[int], str, float]]


class Writer:
    """Makes contexts of exactly ``length`` tokens. The same seed, task, length and number give the same context."""

    def __init__(self, tokenizer, texts: list[str], form: str):
        self.tokenizer, self.texts = tokenizer, texts
        if form == "chat":
            mark = "\x00"
            turn = [{"role": "user", "content": f"{mark}\n\n{mark}"}]
            shell = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            self.head, self.before, self.after = shell.split(mark)
        else:
            self.head, self.before, self.after = "", "\n\nQuestion: ", "\nAnswer: "

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def sample(self, task: Task, length: int, seed: str) -> Sample:
        rng = random.Random(seed)
        drawn = task.draw(rng)
        hidden = [self.ids(task.hidden.format(name=name, value=value)) for name, value in drawn]
        head = self.ids(self.head)
        novel = self.novel(rng, length - len(head) - sum(map(len, hidden)))
        ends = [i + 1 for i, token in enumerate(novel) if self.tokenizer.decode(token).endswith(".")]
        cuts = [rng.choice(ends) for _ in hidden]
        ids, done = list(head), 0
        for cut, sentence in sorted(zip(cuts, hidden, strict=True), key=lambda pair: pair[0]):
            ids += novel[done:cut] + sentence
            done = cut
        ids += novel[done:]
        ask = self.before + task.question + self.after + task.begun
        questions = [
            (self.ids(ask.format(name=name)), value, cut / len(novel))
            for (name, value), cut in zip(drawn, cuts, strict=True)
        ]
        return Sample(ids, questions)

    def novel(self, rng: random.Random, tokens: int) -> list[int]:
        """A piece that begins with a sentence; line breaks become spaces."""
        characters = 8 * tokens
        text = rng.choice(self.texts)
        start = rng.randrange(max(1, len(text) - characters))
        piece = " ".join(text[start : start + characters].split())
        ids = self.ids(piece[piece.find(". ") + 2 :])[:tokens]
        if len(ids) < tokens:
            raise ValueError(f"a text of {len(text)} characters is too short for a context of {tokens} tokens")
        return ids


class Growing:
    """One token per row through a cache whose rows may be padded: what ``DecodeStep`` is for a static one."""

    def __init__(self, model, cache, seen: int, rows: int):
        self.model, self.cache = model, cache
        self.mask = torch.ones(rows, seen, dtype=torch.int64, device=model.device)

    def __call__(self, token_B: torch.Tensor, real_B: torch.Tensor) -> torch.Tensor:
        self.mask = torch.cat([self.mask, real_B[:, None]], 1)
        position = (self.mask.sum(-1, keepdim=True) - 1).clamp_min(0)
        return self.model(
            input_ids=token_B[:, None],
            attention_mask=self.mask,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]


def recorded_step(model, policy, budget: int | None, rows: int) -> DecodeStep | None:
    """On a GPU: a decode step as a CUDA graph, for policies that hold a fixed number of slots."""
    if model.device.type != "cuda" or not policy.bounded or policy.grows or policy.selects:
        return None
    return DecodeStep(model, trimkv.bounded_cache(model, policy, budget, rows=rows), masked=True)


@torch.inference_mode()
def answers(model, tokenizer, cache, samples: list[Sample], chunk: int, step: DecodeStep | None = None) -> list[str]:
    """Reads the contexts into the cache, copies each row once per question, asks. Returns the answers' texts.

    Args:
        step: takes over the copies, if there is one.
    """
    device = model.device
    ids = torch.tensor([sample.ids for sample in samples], device=device)
    trimkv.prefill(model, cache, ids, chunk=chunk)
    per_context = len(samples[0].questions)
    questions = [(q, a) for sample in samples for q, a, _ in sample.questions]
    if step is None:
        cache.batch_repeat_interleave(per_context)
        feed = Growing(model, cache, ids.shape[1], len(questions))
    else:
        feed = step
        step.cache.reset()
        for row in range(len(questions)):
            step.cache.copy_row(cache, row // per_context, row)
    width = max(len(q) for q, _ in questions)
    padded = torch.tensor([[tokenizer.eos_token_id] * (width - len(q)) + q for q, _ in questions], device=device)
    real = torch.tensor([[0] * (width - len(q)) + [1] * len(q) for q, _ in questions], device=device)
    for t in range(width):
        logits = feed(padded[:, t], real[:, t])
    out = [logits.argmax(-1)]
    for _ in range(1 + max(len(tokenizer(f" {a}", add_special_tokens=False).input_ids) for _, a in questions)):
        out.append(feed(out[-1], torch.ones_like(out[-1])).argmax(-1))
    return tokenizer.batch_decode(torch.stack(out, 1), skip_special_tokens=True)


def right(answer: str, value: str) -> bool:
    """Exact match of the first word of what follows "The pass key is"."""
    found = re.match(r"\W*(\w+)", answer)
    return found is not None and found[1] == value


@dataclass
class Cell:
    task: str
    length: int
    policy: str
    budget: int | None
    exact_match: float
    samples: int
    by_depth: list[float | None]  # exact match by quarter of the context in which the fact lies
    peak_prefill_tokens_per_head: int
    peak_decode_tokens_per_head: int
    cache_bytes_per_sequence: int
    seconds: float
    first_answers: list[list[str]]  # value, answer


def measure(model, tokenizer, samples: list[Sample], policy, budget: int | None, args, task: str, length: int) -> Cell:
    start, marks, shown, cache, rows, step = time.perf_counter(), [], [], None, 0, None
    for first in range(0, len(samples), args.batch):
        batch = samples[first : first + args.batch]
        cache = trimkv.bounded_cache(model, policy, budget or 1, chunk=args.chunk)
        if rows != len(batch) * len(batch[0].questions):
            step = recorded_step(model, policy, budget, len(batch) * len(batch[0].questions))
        texts = iter(answers(model, tokenizer, cache, batch, args.chunk, step))
        for _, value, depth in (question for sample in batch for question in sample.questions):
            text = next(texts)
            marks.append((right(text, value), depth))
            shown.append([value, text])
        rows = len(batch) * len(batch[0].questions)
    held = cache if step is None else step.cache
    quarters = [[ok for ok, depth in marks if int(min(depth, 0.999) * 4) == quarter] for quarter in range(4)]
    return Cell(
        task=task,
        length=length,
        policy=policy.name,
        budget=budget,
        exact_match=round(sum(ok for ok, _ in marks) / len(marks), 4),
        samples=len(marks),
        by_depth=[round(sum(q) / len(q), 3) if q else None for q in quarters],
        peak_prefill_tokens_per_head=cache.peak_prefill_tokens,
        peak_decode_tokens_per_head=held.peak_decode_tokens,
        cache_bytes_per_sequence=held.nbytes // rows,
        seconds=round(time.perf_counter() - start, 1),
        first_answers=shown[:4],
    )


def show(cells: list[dict], budgets: list[int]) -> None:
    """A table per task and length: policies down, budgets across, per cent."""
    console = Console(width=100)
    for task, length in dict.fromkeys((cell["task"], cell["length"]) for cell in cells):
        here = [cell for cell in cells if (cell["task"], cell["length"]) == (task, length)]
        full = next((cell["exact_match"] for cell in here if cell["budget"] is None), None)
        title = f"{task}, {length} tokens, {here[0]['samples']} questions: exact match in %"
        if full is not None and full <= MASTERED:
            title += "; the model itself masters less than 70 %"
        table = Table("policy", title=title)
        for budget in budgets:
            table.add_column(str(budget), justify="right")
        for policy in dict.fromkeys(cell["policy"] for cell in here):
            of = {cell["budget"]: f"{100 * cell['exact_match']:.0f}" for cell in here if cell["policy"] == policy}
            table.add_row(policy, *(of.get(budget, of.get(None, "")) for budget in budgets))
        console.print(table)


def plan(model, args) -> tuple[list[tuple[Policy, int | None]], dict[str, str]]:
    """Every cell of a task and length, the full cache first; and of "all" policies those that cannot run, with why."""
    names, left_out = args.policies.split(","), {}
    every = names == ["all"]
    budgets = [int(budget) for budget in args.budgets.split(",")]
    policies = [make("full")]
    for policy in (make(name) for name in (POLICIES if every else names) if name != "full"):
        try:
            trimkv.bounded_cache(model, policy, min(budgets))
        except ValueError as error:
            if not every:
                raise
            left_out[policy.name] = str(error)
            print(f"left out: {error}", flush=True)
            continue
        policies.append(policy)
    return [(p, b) for p in policies for b in (budgets if p.bounded or p.selects else [None])], left_out


class Done:
    """Cells that an earlier call with the same settings finished, one JSON line each after a line of settings."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.cells = path, []
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if lines and lines[0] == settings:
            self.cells = lines[1:]
        else:
            if lines:
                print(f"{path.name}: of other settings, begun anew", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings) + "\n")

    def find(self, **key) -> dict | None:
        return next((cell for cell in self.cells if key.items() <= cell.items()), None)

    def add(self, cell: dict) -> None:
        self.cells.append(cell)
        with self.path.open("a") as file:
            file.write(json.dumps(cell) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="novels: .txt or .jsonl with `text`, also .gz")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--gates", default="bundled", help="'none' leaves trimkv out")
    parser.add_argument("--heads", default="", help="of locret, seer_attention_r: these names if bundled, or folders")
    parser.add_argument("--tasks", default="passkey,pairs")
    parser.add_argument("--form", choices=("chat", "plain"), default="plain")
    parser.add_argument("--lengths", default="2000,4000,6000")
    parser.add_argument("--policies", default="all", help="names with commas between; the full cache is always added")
    parser.add_argument("--budgets", default="64,128,256,512")
    parser.add_argument("--samples", type=int, default=100, help="questions a cell, at least")
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, help="contexts at a time  [default: 50 on a GPU, 4 on a CPU]")
    parser.add_argument("--name", default="retrieval")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.batch = args.batch or (4 if args.device == "cpu" else 50)
    place = embedded.resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, args.dtype)).eval().to(args.device)
    model.config._name_or_path = args.model
    if args.gates != "none":
        trimkv.attach(model, args.gates)
    for heads in filter(None, args.heads.split(",")):
        attach_heads(model, heads)
    texts = [text.text for text in read_texts([args.text]) if text.text]
    writer = Writer(tokenizer, texts, args.form)
    settings = {key: getattr(args, key) for key in SETTINGS}
    settings |= {"text": Path(args.text).name, "tasks": {name: asdict(task) for name, task in TASKS.items()}}
    done = Done(args.folder / f"{args.name}.cells.jsonl", settings)
    order, left_out = plan(model, args)
    cells = []
    for task in args.tasks.split(","):
        for length in map(int, args.lengths.split(",")):
            number = -(-args.samples // TASKS[task].per_context)
            samples = [writer.sample(TASKS[task], length, f"{args.seed} {task} {length} {i}") for i in range(number)]
            for policy, budget in order:
                cell = done.find(task=task, length=length, policy=policy.name, budget=budget)
                if cell is None:
                    cell = asdict(measure(model, tokenizer, samples, policy, budget, args, task, length))
                    done.add(cell)
                    result = f"{cell['exact_match']} {cell['seconds']} s"
                    print(f"{task} {length} {policy.name} {budget}: {result}", flush=True)
                cells.append(cell)
    show(cells, [int(budget) for budget in args.budgets.split(",")])
    save(args.name, {**settings, "left_out": left_out, "rows": cells}, args.folder)


if __name__ == "__main__":
    main()
