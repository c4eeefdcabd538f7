"""The engine on a GPU: steady decoding against the bandwidth of a copy, and a mixed load against steady decoding.

    python benchmarks/engine_gpu.py                          # several minutes on one GPU; saves after every part
    python benchmarks/engine_gpu.py --sampling               # tokens are drawn, not the argmax
    python benchmarks/engine_gpu.py --shape tiny --steady 40x2 --steps 4 --requests 3 --longest 60 --budget 16

Weights and prompts are random: what a step costs does not depend on what they say. Gates are new ones, so that the
policy is trimkv with all that it does.

Steady: so many requests that have read so many tokens each, timed through Engine.step while all of them run. The floor
is the time to move all weights and slots once, at the bandwidth of a copy in the same run. Beside it stands what a full
cache of 32,768 tokens per row could reach at most by the same reckoning.

Load: requests with prompts of mixed lengths and outputs of mixed lengths in fewer rows, all queued at once. Prompts
cost time that steady decoding does not have, so there are two fractions: output tokens per second over steady ones,
and the time that reading alone and decoding alone would take over the time that was taken.
"""

import argparse
import random
import time
from pathlib import Path

import record
import torch

from trimkv import Engine, SamplingParams
from trimkv.bench import models
from trimkv.bench.measure import copy_bandwidth
from trimkv.bench.shapes import SHAPES

FULL_CONTEXT = 32_768


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def random_prompt(length: int, vocabulary: int, seed: int) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def moved_bytes(engine: Engine) -> tuple[int, int]:
    """Of a step: weights, and the slots of all rows. An embedding that is no output layer too is only looked up."""
    model, weights = engine.model, engine.memory["weights"]
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        weights -= model.get_input_embeddings().weight.nbytes
    return weights, engine.memory["slots"]


def steady(model, context: int, batch: int, args, bandwidth: float, sampling: dict) -> dict:
    """All rows have read ``context`` tokens; a prefix that they share spares reading it for each."""
    vocabulary, device = model.config.vocab_size, args.device
    start = time.perf_counter()
    with Engine(model, "trimkv", args.budget, rows=batch, chunk=args.chunk, **how(args)) as engine:
        wait(device)
        started = time.perf_counter() - start
        prompt = random_prompt(context, vocabulary, seed=context)
        if context > args.chunk:
            engine.prefix(prompt[:-1])
        params = SamplingParams(args.steps * 2 + 20 + batch, ignore_eos=True, **sampling)
        requests = [engine.add(prompt, params) for _ in range(batch)]
        while any(request.status != "running" for request in requests):
            engine.step()
        for _ in range(5):
            engine.step()
        seconds = []
        for _ in range(2):
            wait(device)
            start = time.perf_counter()
            for _ in range(args.steps):
                engine.step()
            wait(device)
            seconds.append((time.perf_counter() - start) / args.steps)
        assert not any(request.done for request in requests), "a row was done before the clock stopped"
        weights, slots = moved_bytes(engine)
        fused = engine.runner.fused is not None
        for request in requests:
            request.cancel()
        full_row = FULL_CONTEXT * sum(s.bytes_per_token for s in engine.runner.cache.stores)
    step, floor = min(seconds), (weights + slots) / bandwidth
    full_floor = (weights + batch * full_row) / bandwidth
    return {
        "context": context,
        "batch": batch,
        "ms_per_step": round(1000 * step, 4),
        "ms_per_step_both": [round(1000 * s, 4) for s in seconds],
        "tokens_per_second": round(batch / step, 1),
        "floor_ms": round(1000 * floor, 4),
        "floor_tokens_per_second": round(batch / floor, 1),
        "fraction_of_floor": round(floor / step, 4),
        "full_cache_32k_floor_tokens_per_second": round(batch / full_floor, 1),
        "fused": fused,
        "weight_bytes": weights,
        "slot_bytes": slots,
        "start_seconds": round(started, 2),
    }


def how(args) -> dict:
    """Options of every engine."""
    return {"compile": args.compile, "fast_start": args.fast_start, "fused": args.fused}


def reading_rate(model, args) -> float:
    """Tokens per second of reading one long prompt with nothing beside it, by graphs where there are any."""
    tokens = max(args.longest // 2, args.chunk)
    with Engine(model, "trimkv", args.budget, rows=1, chunk=args.chunk, **{**how(args), "fast_start": False}) as engine:
        for seed in (1, 2):
            prompt = random_prompt(tokens, model.config.vocab_size, seed)
            wait(args.device)
            start = time.perf_counter()
            engine.generate([prompt], SamplingParams(1, ignore_eos=True), progress=False)
            seconds = time.perf_counter() - start
    return tokens / seconds


def load(model, args, steady_rate: float, sampling: dict) -> dict:
    """Many requests in fewer rows, all queued at once."""
    draw = random.Random(0)
    ratio = args.longest / args.shortest
    lengths = [int(args.shortest * ratio ** draw.random()) for _ in range(args.requests)]
    lengths[0], lengths[-1] = args.longest, args.shortest
    outputs = [draw.randint(*args.outputs) for _ in lengths]
    prompts = [random_prompt(n, model.config.vocab_size, seed) for seed, n in enumerate(lengths)]
    reading = reading_rate(model, args)
    with Engine(model, "trimkv", args.budget, rows=args.rows, chunk=args.chunk, **how(args)) as engine:
        params = [SamplingParams(n, ignore_eos=True, **sampling) for n in outputs]
        wait(args.device)
        start = time.perf_counter()
        found = engine.generate(prompts, params, progress=False)
        seconds = time.perf_counter() - start
        memory = engine.memory
    assert [len(request.tokens) for request in found] == outputs, "a request ended early"
    gaps = [1000 * (b - a) for r in found for a, b in zip(r.times, r.times[1:], strict=False)]
    read, made = sum(lengths), sum(outputs)
    alone = read / reading + made / steady_rate
    p50, p99 = percentile(gaps, 0.5), percentile(gaps, 0.99)
    return {
        "requests": len(prompts),
        "rows": args.rows,
        "prompt_tokens": read,
        "output_tokens": made,
        "seconds": round(seconds, 3),
        "steady_tokens_per_second": steady_rate,
        "reading_tokens_per_second": round(reading, 1),
        "output_tokens_per_second": round(made / seconds, 1),
        "all_tokens_per_second": round((read + made) / seconds, 1),
        "fraction_of_steady": round(made / seconds / steady_rate, 4),
        "fraction_of_reading_and_decoding_alone": round(alone / seconds, 4),
        "inter_token_ms": {"p50": round(p50, 3), "p99": round(p99, 3), "p99_over_p50": round(p99 / p50, 3)},
        "memory_bytes": memory,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--steady", nargs="*", default=["32786x4", "16378x4", "16378x8", "2048x64"], metavar="TxB")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--requests", type=int, default=64, help="0 leaves the load out")
    parser.add_argument("--rows", type=int, default=16, help="of the load")
    parser.add_argument("--shortest", type=int, default=100)
    parser.add_argument("--longest", type=int, default=30_000)
    parser.add_argument("--outputs", type=int, nargs=2, default=[64, 1024], help="the fewest and the most tokens")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fast-start", action="store_true", help="capture graphs when they are needed")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, help="[default: where it can be]")
    parser.add_argument("--sampling", action="store_true", help="temperature 0.8, top-k 50, top-p 0.95, penalty 1.1")
    parser.add_argument("--name", default="engine_gpu", help="of the result")
    parser.add_argument("--output", type=Path, help="folder of the result")
    args = parser.parse_args()
    options = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 1}
    sampling = options if args.sampling else {}
    args.shortest = min(args.shortest, args.longest)
    # Its positions reach far beyond the longest prompt: an engine refuses prompts that its model does not know.
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = models.build(args.shape, args.device, dtype)
    bandwidth = copy_bandwidth(torch.device(args.device))
    result = {
        "shape": args.shape,
        "policy": "trimkv",
        "budget": args.budget,
        "chunk": args.chunk,
        "dtype": str(model.dtype),
        "sampling": sampling or "greedy",
        **how(args),
        "copy_bandwidth": bandwidth,
        "steady": [],
    }
    for what in args.steady:
        context, batch = map(int, what.split("x"))
        result["steady"].append(steady(model, context, batch, args, bandwidth, sampling))
        record.save(args.name, result, args.output)
    if args.requests:
        beside = steady(model, 2 * args.budget, args.rows, args, bandwidth, sampling)
        result["steady"].append(beside)
        result["load"] = load(model, args, beside["tokens_per_second"], sampling)
        record.save(args.name, result, args.output)


if __name__ == "__main__":
    main()
