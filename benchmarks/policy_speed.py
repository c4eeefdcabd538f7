"""Milliseconds per decode step of every policy, on random weights of smollm2's shape.

    python benchmarks/policy_speed.py                    # about half an hour on 2 cores, a few minutes on a GPU

Each policy reads 1,024 random tokens in chunks. Then short rounds alternate, every policy in each, and are compared in
pairs with `full` and with `streaming_llm`, so that a drifting machine hits all. `full` attends to all tokens: its
context is that of the first round at least, and grows by a token a step. Gates and heads are untrained ones of the
sizes that smollm2's have: what they say does not change what they cost.

On a GPU a step is a replayed CUDA graph, but for seer_attention_r, whose slots grow with the text. On a CPU the model
runs step by step, as `generate` runs it.
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import torch
from record import save
from shapes import SMOLLM2
from transformers import LlamaConfig, LlamaForCausalLM

import trimkv
from trimkv.cache.graph import DecodeStep
from trimkv.cache.policies import POLICIES, make
from trimkv.gates.attach import new_gates
from trimkv.gates.head_sets import attach_heads, new_heads

SIZES = {"trimkv": 160, "locret": 64, "seer_attention_r": 32}  # widths
BLOCK = 16  # of seer_attention_r
AGAINST = ("full", "streaming_llm")


def build(device: str, layers: int):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2, "num_hidden_layers": layers})).eval().to(device, dtype)
    trimkv.attach(model, new_gates(model, intermediate_size=SIZES["trimkv"]))
    attach_heads(model, new_heads(model, "locret", SIZES["locret"]))
    return attach_heads(model, new_heads(model, "seer_attention_r", SIZES["seer_attention_r"], BLOCK))


def allocated(device: str) -> int | None:
    """Bytes that the GPU's allocator has given out; a CPU's does not say."""
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else None


def decode(step, tokens_TB: torch.Tensor) -> float:
    """Milliseconds per step of feeding these tokens one by one."""
    if tokens_TB.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for token in tokens_TB:
        step(token)
    if tokens_TB.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / len(tokens_TB)


def plain_step(model, cache):
    return lambda token_B: model(token_B[:, None], past_key_values=cache, use_cache=True)


def read(model, name: str, prompt_BT: torch.Tensor, length: int, args):
    """A cache that has read the prompt, and what feeds it a token. ``full`` gets slots for the whole length."""
    batch, policy = len(prompt_BT), make(name)
    recorded = args.device == "cuda" and not policy.selects
    budget = args.budget if policy.bounded or policy.selects else length
    cache = trimkv.bounded_cache(model, policy, budget, chunk=args.chunk, rows=batch if recorded else None)
    trimkv.prefill(model, cache, prompt_BT, chunk=args.chunk)
    return cache, DecodeStep(model, cache) if recorded else plain_step(model, cache)


@torch.inference_mode()
def measure(model, names: list[str], batch: int, args) -> list[dict]:
    """One row per policy."""
    device, generator = args.device, torch.Generator().manual_seed(0)
    length = args.prompt + (args.rounds + 1) * args.steps
    ids = torch.randint(10, 40_000, (batch, length), generator=generator).to(device)
    prompt, rest = ids[:, : args.prompt], ids[:, args.prompt :].T.contiguous()
    decode(plain_step(model, trimkv.bounded_cache(model, "full")), rest[:8])  # libraries allocate their workspaces once
    caches, steps, held = {}, {}, {}
    for name in names:
        before = allocated(device)
        caches[name], steps[name] = read(model, name, prompt, length, args)
        decode(steps[name], rest[: args.steps])  # warms up, and makes `full` grow once
        held[name] = None if before is None else allocated(device) - before
    times = {name: [] for name in names}
    for number, tokens in enumerate(rest[args.steps :].split(args.steps)):
        for name in names:
            times[name].append(decode(steps[name], tokens))
        print(f"batch {batch}, round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    return [_row(name, batch, caches[name], held[name], times) for name in names]


def _row(name: str, batch: int, cache, held: int | None, times: dict[str, list[float]]) -> dict:
    layers = cache.slot_layers
    store, policy = layers[0].store, layers[0].policy
    heads = SMOLLM2["num_attention_heads"], SMOLLM2["num_key_value_heads"]
    extra = len(layers) * policy.extra_bytes(store.capacity, *heads, store.k.shape[-1])
    ratios = {
        f"over_{other}": round(statistics.median(a / b for a, b in zip(times[name], times[other], strict=True)), 3)
        for other in AGAINST
    }
    return {
        "policy": name,
        "batch": batch,
        "ms": round(statistics.median(times[name]), 3),
        **ratios,
        "rounds": [round(ms, 3) for ms in times[name]],
        "extra_state_bytes_per_sequence": extra,
        "cache_bytes": cache.nbytes,
        "allocated_bytes_before_the_rounds": held,
        "peak_decode_tokens_per_head": cache.peak_decode_tokens,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--policies", default=",".join(POLICIES), help="full and streaming_llm are measured anyway")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=8, help="in a round")
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"], help="fewer for a quick look")
    parser.add_argument("--output", type=Path, help="folder; default benchmarks/results")
    args = parser.parse_args()
    names = list(dict.fromkeys([*AGAINST, *args.policies.split(",")]))
    model, rows = build(args.device, args.layers), []
    settings = {name: getattr(args, name) for name in ("budget", "prompt", "chunk", "rounds", "steps", "layers")}
    last = args.prompt + (args.rounds + 1) * args.steps
    result = {
        **settings,
        "device": args.device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "context_of_full": [args.prompt + args.steps, last],
        "shape": {**SMOLLM2, "num_hidden_layers": args.layers},
        "widths_of_gates_and_heads": SIZES,
    }
    for batch in map(int, args.batches.split(",")):
        rows += measure(model, names, batch, args)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        save(f"policy_speed_{args.device}", {**result, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
