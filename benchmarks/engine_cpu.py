"""The engine with 8 requests at once against stock `generate` with one after the other, on a CPU, in one run.

    OMP_NUM_THREADS=2 python benchmarks/engine_cpu.py            # about 4 minutes on 2 cores

Both get the same prompts of random tokens and make equally many tokens, prompts included in the time. Rounds alternate,
so that a drifting machine hits both. Requests that fit the budget must have stock's own tokens, or nothing is reported.
"""

import argparse
import statistics
import sys
import time

import torch
from record import save
from transformers import AutoModelForCausalLM

from trimkv import Engine, SamplingParams, embedded


def stock_tokens(model, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    return out[0, len(prompt) :].tolist()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 64, 96, 128, 160, 200, 300, 400])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", default="trimkv")
    args = parser.parse_args()
    place = embedded.resolve("smollm2")
    stock = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    engine = Engine("smollm2", args.policy, args.budget, rows=len(args.prompts), chunk=args.chunk)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 40_000, (n,), generator=generator).tolist() for n in args.prompts]
    end = stock.generation_config.eos_token_id
    stock.generation_config.eos_token_id = None  # as the engine, which is told to go on
    stock.generation_config.pad_token_id = end
    params = SamplingParams(args.new_tokens, ignore_eos=True)

    seconds, tokens, gaps = {"stock": [], "engine": []}, {}, []
    for number in range(args.rounds + 1):
        start = time.perf_counter()
        tokens["stock"] = [stock_tokens(stock, prompt, args.new_tokens) for prompt in prompts]
        middle = time.perf_counter()
        found = engine.generate(prompts, params, progress=False)
        round_seconds = {"stock": middle - start, "engine": time.perf_counter() - middle}
        tokens["engine"] = [request.tokens for request in found]
        for request, truth in zip(found, tokens["stock"], strict=True):
            if len(request.prompt) + args.new_tokens <= args.budget and request.tokens != truth:
                sys.exit(f"wrong: other tokens than stock's after {len(request.prompt)} tokens. No times.")
        if number:  # the first warms up
            for name, value in round_seconds.items():
                seconds[name].append(value)
            times = [request.times for request in found]
            gaps += [1000 * (b - a) for t in times for a, b in zip(t, t[1:], strict=False)]
        print(number, {name: round(value, 2) for name, value in round_seconds.items()}, file=sys.stderr)
    made = len(prompts) * args.new_tokens
    ratios = [a / b for a, b in zip(seconds["stock"], seconds["engine"], strict=True)]
    save(
        f"engine_cpu_{args.policy}",
        {
            "model": "smollm2",
            "policy": args.policy,
            "budget": args.budget,
            "chunk": args.chunk,
            "prompt_tokens": args.prompts,
            "new_tokens": args.new_tokens,
            "stock_tokens_per_second": round(made / statistics.median(seconds["stock"]), 2),
            "engine_tokens_per_second": round(made / statistics.median(seconds["engine"]), 2),
            "speedup": round(statistics.median(ratios), 3),
            "speedup_of_fastest_rounds": round(min(seconds["stock"]) / min(seconds["engine"]), 3),
            "speedup_per_round": [round(ratio, 3) for ratio in ratios],
            "seconds": {name: [round(v, 2) for v in values] for name, values in seconds.items()},
            "inter_token_ms": {"p50": round(percentile(gaps, 0.5), 1), "p99": round(percentile(gaps, 0.99), 1)},
            "memory_bytes": engine.memory,
        },
    )


if __name__ == "__main__":
    main()
