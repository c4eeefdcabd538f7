"""Decoding speed on the CPU: stock `generate` with its full cache against a bounded cache, in one run.

    python benchmarks/cpu_decode.py            # about 3 minutes on 2 cores

Part 1: both continue the same 4,000-token prompt; short rounds alternate and are
compared in pairs, so that a drifting machine hits both.
Part 2: the bounded cache alone after 500 and after 8,000 tokens: a step costs the same for ever.
Token ids are random: what is said does not change what a step costs.
"""

import argparse
import statistics
import sys
import time

import torch
from record import save
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.streamers import BaseStreamer

import trimkv
from trimkv import embedded


class Clock(BaseStreamer):
    """Notes when each token arrives."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def milliseconds(self) -> list[float]:
        steps = self.times[1:]  # the first call carries the prompt
        return [1000 * (b - a) for a, b in zip(steps, steps[1:], strict=False)]


def continue_from(model, cache, new_tokens: int) -> list[float]:
    """Milliseconds per token of `generate` going on from a filled cache."""
    clock, seen = Clock(), cache.get_seq_length()
    model.generate(
        torch.full((1, 1), 5),
        attention_mask=torch.ones(1, seen + 1, dtype=torch.long),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
    )
    return clock.milliseconds()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--policy", default="streaming_llm")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(embedded.resolve("smollm2"), dtype=torch.float32).eval()
    stock = AutoModelForCausalLM.from_pretrained(embedded.resolve("smollm2"), dtype=torch.float32).eval()
    if args.policy == "trimkv":
        from trimkv.gates.attach import new_gates

        trimkv.attach(model, new_gates(model, intermediate_size=128))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 40_000, (1, 8000), generator=generator)

    full = DynamicCache(config=stock.config)
    trimkv.prefill(stock, full, ids[:, : args.prompt])
    bounded = trimkv.bounded_cache(model, args.policy, args.budget)
    trimkv.prefill(model, bounded, ids[:, : args.prompt])
    times = {"full": [], "bounded": []}
    for number in range(args.rounds + 1):
        rounds = {
            "full": continue_from(stock, full, args.new_tokens),
            "bounded": continue_from(model, bounded, args.new_tokens),
        }
        if number:  # the first warms up
            for name, values in rounds.items():
                times[name].append(statistics.median(values))
        print(number, {k: round(statistics.median(v), 2) for k, v in rounds.items()}, file=sys.stderr)
    ms = {name: statistics.median(values) for name, values in times.items()}
    ratios = [full / ours for full, ours in zip(times["full"], times["bounded"], strict=True)]

    ages = {}
    caches = {age: trimkv.bounded_cache(model, args.policy, args.budget) for age in (500, 8000)}
    for age, cache in caches.items():
        trimkv.prefill(model, cache, ids[:, :age])
        ages[age] = []
    for number in range(args.rounds + 1):
        for age, cache in caches.items():
            step = statistics.median(continue_from(model, cache, args.new_tokens))
            if number:
                ages[age].append(step)
    early, late = (statistics.median(ages[age]) for age in (500, 8000))
    drift = statistics.median(b / a for a, b in zip(ages[500], ages[8000], strict=True))
    save(
        f"cpu_decode_{args.policy}",
        {
            "model": "smollm2",
            "policy": args.policy,
            "prompt_tokens": args.prompt,
            "budget": args.budget,
            "full_ms_per_token": round(ms["full"], 2),
            "bounded_ms_per_token": round(ms["bounded"], 2),
            "speedup": round(statistics.median(ratios), 3),
            "speedup_per_round": [round(ratio, 3) for ratio in ratios],
            "rounds": {name: [round(v, 2) for v in values] for name, values in times.items()},
            "ms_per_token_after_500": round(early, 2),
            "ms_per_token_after_8000": round(late, 2),
            "late_over_early": round(drift, 3),
        },
    )


if __name__ == "__main__":
    main()
