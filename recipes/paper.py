"""The paper's trainings (arXiv 2512.03324, section 5): which data, which columns, which numbers.

    python recipes/paper.py openr1-math --model Qwen/Qwen3-4B --output gates
    torchrun --nproc-per-node 4 recipes/paper.py openr1-math --model Qwen/Qwen3-4B --output gates
    python recipes/paper.py long --model Qwen/Qwen3-4B-Instruct-2507 --output gates --data COPIES

COPIES holds copies of the datasets' repositories in folders named like them, such as COPIES/OpenR1-Math-220k. Columns
and prompts are those of the authors' loaders. Two things differ: records that are longer than a sample are cut instead
of dropped, and the shortest record is measured in characters (four to a token), so that it need not be tokenised.

Where the paper and the authors' scripts disagree, the numbers are the paper's (``GateConfig.paper``): weight decay is
0.01 there and 1e-5 (math) or 1e-6 (long) in the scripts.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from trimkv.train import processes, run_folder
from trimkv.train.config import GateConfig
from trimkv.train.data import PackedTexts, Source
from trimkv.train.hub import pin

CHARACTERS = 4  # of a token, about


@dataclass(frozen=True)
class Part:
    """A dataset of the hub.

    Attributes:
        path: as ``Source`` takes it, revision included where one is known; else today's newest is pinned at the start.
        convert: record -> {"messages": [...]}, or None for one that is left out.
    """

    path: str
    convert: Callable[[dict], dict | None]

    @property
    def folder(self) -> str:
        """What a local copy's folder is called."""
        return self.path.removeprefix("hub:").split("@")[0].split(":")[0].split("/")[1]


@dataclass(frozen=True)
class Recipe:
    """Attributes: parts, the numbers, and how many steps (None: every sample once)."""

    parts: tuple[Part, ...]
    config: GateConfig
    steps: int | None = None


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def long_enough(record: dict, tokens: int = 4096) -> dict | None:
    """Records of fewer tokens teach little about forgetting: they are left out."""
    size = sum(len(message["content"]) for message in record["messages"])
    return record if size > tokens * CHARACTERS else None


def openr1_math(record: dict) -> dict | None:
    """messages: a problem, and a solution with its thoughts. Solutions that are next to nothing are left out."""
    return long_enough({"messages": record["messages"]}, tokens=512 // CHARACTERS)


def synth_long(record: dict) -> dict | None:
    """conversations: messages already, with documents of up to 32K tokens in the question."""
    return long_enough({"messages": record["conversations"]})


def booksum(record: dict) -> dict | None:
    """text: a whole book. summary: several, [{"text": ...}, ...]; the book's length picks one, always the same."""
    if not record["text"] or not record["summary"]:
        return None
    summary = record["summary"][len(record["text"]) % len(record["summary"])]["text"]
    question = f"Read the following text and summarize it.\n\nText: {record['text']}"
    return long_enough(chat(question, f"Answer: {summary}"))


def buddhi(record: dict) -> dict | None:
    """extended_context, question, answer; some are empty."""
    context, question, answer = (record[name] for name in ("extended_context", "question", "answer"))
    if not all(isinstance(part, str) and part.strip() for part in (context, question, answer)):
        return None
    text = f"Read the context and answer the question.\n\nContext: {context}\n\nQuestion: {question}"
    return long_enough(chat(text, f"Answer: {answer}"))


def long_alpaca(record: dict) -> dict | None:
    """instruction (which holds the document), input (mostly empty), output. Its short quarter is kept, as it is."""
    question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part and part.strip())
    return chat(question, record["output"]) if question and (record["output"] or "").strip() else None


# Revisions that are missing here are not known to us; what was read on the day is in gates.json.
SYNTH_LONG = ("train_convqa_raft", "train_convqa_raft_syntactic", "train_narrativeqa_aug_32k", "train_rag_tge_raft")
RECIPES = {
    # One epoch; TrimKV-Qwen3-{1.7B,4B,8B,14B}-Math.
    "openr1-math": Recipe(
        (Part("hub:open-r1/OpenR1-Math-220k/default@e4e141ec9dea9f8326f4d347be56105859b2bd68", openr1_math),),
        GateConfig.paper(budget=512, context=16_384),
    ),
    # TrimKV-Qwen3-4B-Instruct-2507. M is that of the released gates; the authors' script says 256.
    "long": Recipe(
        (
            *(Part(f"hub:cerebras/Synth-Long-SFT32K:{split}", synth_long) for split in SYNTH_LONG),
            Part("hub:ubaada/booksum-complete-cleaned/books", booksum),
            Part("hub:aiplanet/buddhi-dataset/gpt4", buddhi),
        ),
        GateConfig.paper(budget=4096, context=131_072),
        steps=10_000,
    ),
    # TrimKV-Phi-3-mini-128k-instruct. How many steps is not published: every sample once.
    "longalpaca": Recipe(
        (Part("hub:Yukang/LongAlpaca-12k@46dce924ed8786979556018e191c0f557d8f4aa2", long_alpaca),),
        GateConfig.paper(budget=2048, context=131_072),
    ),
}


def dataset(recipe: Recipe, tokenizer, copies: Path | None = None) -> tuple[PackedTexts, int]:
    """The samples, and the number of steps: the recipe's, or as many as the samples last."""
    config, steps = recipe.config, recipe.steps
    per_step = config.batch_size * config.accumulation * processes.count()
    samples = None if steps is None else steps * per_step
    # Streams are read no further than that.
    most = None if samples is None else -(-samples // len(recipe.parts)) * config.context
    sources = [
        Source(part.path, max_tokens=most, convert=part.convert, folder=copies and copies / part.folder)
        for part in recipe.parts
    ]
    options = {"seed": config.seed, "response_only": True}
    data = PackedTexts(sources, tokenizer, config.context, samples=samples, **options)
    if steps is None:
        steps = len(data) // per_step
        if not steps:
            raise ValueError(f"{len(data)} samples of {config.context} tokens are less than one step takes, {per_step}")
    return data, steps


def run(
    recipe: Recipe,
    model_name: str,
    output: Path,
    copies: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict:
    """Trains on a GPU of its own for each process; on the CPU if there is none."""
    if not resume:
        run_folder.check_free(output, overwrite)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimkv import embedded
    from trimkv.train.trainer import train

    place, device = embedded.resolve(model_name), "cpu"
    if torch.cuda.is_available():
        processes.take_gpu()
        device = "cuda"
    tokenizer = AutoTokenizer.from_pretrained(place)
    if copies is None:
        recipe = replace(recipe, parts=tuple(replace(part, path=pin(part.path)) for part in recipe.parts))
    data, steps = dataset(recipe, tokenizer, copies)
    data[0]  # what is wrong with the data shows before the model is loaded
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype).to(device)
    meta = {"data": ", ".join(part.path.removeprefix("hub:") for part in recipe.parts), "base_model": model_name}
    result = train(model, data, replace(recipe.config, steps=steps), output, None, resume, meta, overwrite=overwrite)
    processes.leave()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder with copies of the datasets")
    parser.add_argument("--steps", type=int, help="default: the recipe's, or every sample once")
    for name in ("budget", "context", "accumulation", "save_steps", "intermediate_size"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="instead of the recipe's")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true", help="replace the gates that --output holds")
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    changes = {"save_steps": 100}
    for name in ("budget", "context", "accumulation", "save_steps", "intermediate_size"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    try:
        recipe = replace(recipe, config=replace(recipe.config, **changes), steps=args.steps or recipe.steps)
        result = run(recipe, args.model, args.output, args.data, args.resume, args.overwrite)
    except (ValueError, OSError) as error:
        sys.exit(_said(error))
    if processes.number() == 0:
        result.pop("history")
        print(json.dumps(result))


def _said(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
