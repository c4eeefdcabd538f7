"""Does a request's answer depend on what runs beside it? The same requests together and one at a time, greedily.

    python benchmarks/engine_equality.py --text novels/valid.jsonl.gz                    # bf16, on a GPU
    python benchmarks/engine_equality.py --text novels/valid.jsonl.gz --requests 24      # some minutes on 2 cores

Prompts are passages of novels of many lengths, most of them longer than the budget. In exact arithmetic nothing could
differ; in bf16 a step of sixteen rows may make its sums in another order than a step of one, and where two tokens are
nearly as likely the last bit decides. Measured without and with the engine's ``batch_invariant``, which keeps it.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from record import RESULTS, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimkv import Engine, SamplingParams, embedded
from trimkv.texts import read_texts


def passages(tokenizer, paths: list[str], number: int, shortest: int, longest: int) -> list[list[int]]:
    """Token ids, the same for everyone."""
    draw = random.Random(0)
    texts = [tokenizer(text.text, verbose=False).input_ids for text in read_texts(paths)]
    found = []
    for _ in range(number):
        ids, length = draw.choice(texts), int(shortest * (longest / shortest) ** draw.random())
        start = draw.randrange(max(1, len(ids) - length))
        found.append(ids[start : start + length])
    return found


def measure(model, tokenizer, prompts, args, batch_invariant: bool) -> dict:
    """The answers of one engine to all prompts at once and to one after the other."""
    params = SamplingParams(args.tokens, ignore_eos=True)
    options = {"rows": args.rows, "chunk": args.chunk, "batch_invariant": batch_invariant}
    with Engine(model, args.policy, args.budget, tokenizer=tokenizer, **options) as engine:
        start = time.perf_counter()
        together = [request.tokens for request in engine.generate(prompts, params)]
        middle = time.perf_counter()
        alone = [engine.generate([prompt], params, progress=False)[0].tokens for prompt in prompts]
        end = time.perf_counter()
    first = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        for a, b in zip(together, alone, strict=True)
    ]
    return {
        "batch_invariant": batch_invariant,
        "same": round(first.count(None) / len(first), 4),
        "first_difference": sorted(i for i in first if i is not None),
        "same_tokens_before_it": round(
            sum(args.tokens if i is None else i for i in first) / len(first) / args.tokens, 4
        ),
        "seconds": round(middle - start, 1),
        "seconds_alone": round(end - middle, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, nargs="+", help=".txt or .jsonl with `text`, also .gz")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policy", default="trimkv")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs=2, default=(50, 1500), help="of prompts: shortest, longest")
    parser.add_argument("--name", default="engine_equality")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    args = parser.parse_args()
    place = embedded.resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(place)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, args.dtype)).to(device).eval()
    model.config._name_or_path = args.model
    prompts = passages(tokenizer, args.text, args.requests, *args.lengths)
    facts = {name: getattr(args, name) for name in ("model", "policy", "dtype", "budget", "chunk", "rows", "requests")}
    result = {
        **facts,
        "tokens": args.tokens,
        "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
        "engines": [measure(model, tokenizer, prompts, args, invariant) for invariant in (False, True)],
    }
    save(args.name, result, args.folder)


if __name__ == "__main__":
    main()
