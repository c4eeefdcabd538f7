"""Memory of the process while smollm2 writes for a long time in a bounded cache.

    python benchmarks/flat_memory.py           # about 5 minutes on 2 cores

A prompt of 6,000 tokens goes through in chunks of 512, then 2,000 tokens are generated with 256 slots per head.
"""

import argparse
import sys
import time

import torch
from record import save
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

import trimkv
from trimkv import embedded
from trimkv.bench.measure import resident_bytes


class Meter(BaseStreamer):
    """Notes time and memory at every token."""

    def __init__(self):
        self.times, self.bytes = [], []

    def put(self, value):
        self.times.append(time.perf_counter())
        self.bytes.append(resident_bytes())

    def end(self):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a text file for the prompt; default: random token ids")
    parser.add_argument("--prompt", type=int, default=6000)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=2000)
    args = parser.parse_args()
    folder = embedded.resolve("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if args.text:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with open(args.text, encoding="utf-8") as file:
            ids = tokenizer(file.read(), return_tensors="pt").input_ids[:, : args.prompt]
    else:
        ids = torch.randint(10, 40_000, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    before = resident_bytes()
    cache = trimkv.bounded_cache(model, "streaming_llm", args.budget, chunk=args.chunk)
    start = time.perf_counter()
    trimkv.prefill(model, cache, ids[:, :-1], chunk=args.chunk)
    prefill_seconds = time.perf_counter() - start
    print(f"prefill {prefill_seconds:.1f} s, peak {cache.peak_prefill_tokens} tokens per head", file=sys.stderr)
    meter = Meter()
    model.generate(
        ids[:, -1:],
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=args.new_tokens,
        min_new_tokens=args.new_tokens,
        do_sample=False,
        streamer=meter,
    )
    step = [1000 * (b - a) for a, b in zip(meter.times[1:], meter.times[2:], strict=False)]
    tenth = max(len(step) // 10, 1)
    mb = 1e6
    save(
        "flat_memory",
        {
            "model": "smollm2",
            "prompt_tokens": ids.shape[1],
            "new_tokens": args.new_tokens,
            "budget": args.budget,
            "chunk": args.chunk,
            "peak_prefill_tokens_per_head": cache.peak_prefill_tokens,
            "peak_decode_tokens_per_head": cache.peak_decode_tokens,
            "cache_bytes": cache.nbytes,
            "peak_cache_bytes": cache.peak_bytes,
            "full_cache_bytes": cache.full_cache_bytes(cache.get_seq_length()),
            "prefill_seconds": round(prefill_seconds, 1),
            "resident_mb": {
                "before": round(before / mb, 1),
                "after_prefill": round(meter.bytes[0] / mb, 1),
                "token_100": round(meter.bytes[min(100, len(meter.bytes) - 1)] / mb, 1),
                "last_token": round(meter.bytes[-1] / mb, 1),
                "largest": round(max(meter.bytes) / mb, 1),
            },
            "ms_per_token_first_tenth": round(sorted(step[:tenth])[tenth // 2], 2),
            "ms_per_token_last_tenth": round(sorted(step[-tenth:])[tenth // 2], 2),
        },
    )


if __name__ == "__main__":
    main()
