"""The engine on a model that two GPUs hold together (tensor parallel), against the same model on one of them.

    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py                     # qwen3-4b, bf16, about two minutes
    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --device cpu --shape tiny --rows 1 2 --context 20 \
        --budget 16 --chunk 8 --steps 4

First a gate: a tiny model in fp32 says the same tokens, and its heads keep the same positions (nine of ten at least:
sums that are split round otherwise, and scores may be all but equal), in one process and in several; without that
nothing is timed. Then the shape with random weights: all rows have read ``context`` tokens
of different texts and run; a step is one token for each. Weights are written to a folder once, since transformers
shards what it loads.
"""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

import record
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import trimkv
from trimkv import Engine, SamplingParams
from trimkv.bench.shapes import SHAPES
from trimkv.gates.attach import new_gates

SAME_HEADS = 0.9
TINY = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 256,
}


def make(shape: dict, folder: Path, device: str, dtype: torch.dtype, gain: float = 1.0) -> None:
    """Random weights as files."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
    model.save_pretrained(folder)


def gates_for(model):
    """Gates whose retention differs from token to token."""
    gates = new_gates(model, training_length=256)
    for parameters in gates.layers.values():
        parameters["linear2.weight"].mul_(100)
    return gates


def load(folder: Path, dtype: torch.dtype, device: str, several: bool):
    where = {"distributed_config": DistributedConfig(tp_plan="auto")} if several else {"device_map": device}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where).eval()
    return trimkv.attach(model, gates_for(model))


def prompt(length: int, vocabulary: int, seed: int) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def said_and_kept(model, policy: str) -> dict:
    """Tokens of a few requests, and the positions of each head afterwards."""
    requests = [(prompt(n, 256, n), SamplingParams(24, ignore_eos=True)) for n in (9, 70, 33)]
    with Engine(model, policy, 24, rows=2, chunk=16, prefixes=0) as engine:
        tokens = [one.tokens for one in engine.generate(*zip(*requests, strict=True), progress=False)]
        layers = [layer.store.position.sort(-1).values.tolist() for layer in engine.runner.cache.slot_layers]
    return {"tokens": tokens, "kept": layers}


def gate(args, folder: Path) -> dict[str, dict]:
    """For some policies, whether several processes and one say the same, and the share of heads that keep the same."""
    leads, policies = dist.get_rank() == 0, ("trimkv", "streaming_llm", "h2o", "keydiff", "tova")
    if leads:
        make(TINY, folder, args.device, torch.float32, gain=4.0)
    dist.barrier()
    alone = {}
    if leads:
        model = load(folder, torch.float32, args.device, several=False)
        alone = {policy: said_and_kept(model, policy) for policy in policies}
    dist.barrier()
    model, same = load(folder, torch.float32, args.device, several=True), {}
    for policy in policies:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, said_and_kept(model, policy))
        kept = [
            [sum(rows, []) for rows in zip(*layers, strict=True)]
            for layers in zip(*(one["kept"] for one in found), strict=True)
        ]
        if leads:
            expected = alone[policy]
            heads = [head for held in (kept, expected["kept"]) for layer in held for row in layer for head in row]
            heads = list(zip(heads[: len(heads) // 2], heads[len(heads) // 2 :], strict=True))
            same[policy] = {
                "tokens": all(one["tokens"] == expected["tokens"] for one in found),
                "heads": sum(a == b for a, b in heads) / len(heads),
            }
    return same


def steady(model, rows: int, args) -> dict:
    """All rows have read a prompt and run; tokens per second of all together."""
    vocabulary, start = model.config.vocab_size, time.perf_counter()
    with Engine(model, args.policy, args.budget, rows=rows, chunk=args.chunk, prefixes=0, fast_start=True) as engine:
        wait(args.device)
        started = time.perf_counter() - start
        reads = -(-args.context // args.chunk)  # steps until the last prompt is read
        params = SamplingParams(rows * reads + 2 * args.steps + 20, ignore_eos=True)
        start = time.perf_counter()
        requests = [engine.add(prompt(args.context, vocabulary, seed), params) for seed in range(rows)]
        while any(request.status != "running" for request in requests):
            engine.step()
        wait(args.device)
        reading = time.perf_counter() - start
        for _ in range(5):
            engine.step()
        seconds = []
        for _ in range(2):
            wait(args.device)
            start = time.perf_counter()
            for _ in range(args.steps):
                engine.step()
            wait(args.device)
            seconds.append((time.perf_counter() - start) / args.steps)
        assert not any(request.done for request in requests), "a row was done before the clock stopped"
        tokens, memory = [request.tokens[:32] for request in requests], engine.memory
        for request in requests:
            request.cancel()
        engine.step()
    return {
        "rows": rows,
        "ms_per_step": round(1000 * min(seconds), 4),
        "tokens_per_second": round(rows / min(seconds), 1),
        "reading_seconds": round(reading, 3),
        "start_seconds": round(started, 2),
        "bytes_per_process": memory,
        "tokens": tokens,
    }


def compare(one: dict, several: dict) -> dict:
    """How far both said the same: bf16 rounds otherwise where sums are split."""
    pairs = list(zip(one.pop("tokens"), several.pop("tokens"), strict=True))
    same = [next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), 32) for pair in pairs]
    faster = several["tokens_per_second"] / one["tokens_per_second"]
    return {"one": one, "several": several, "times_as_fast": round(faster, 3), "same_first_tokens": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="qwen3-4b")
    parser.add_argument("--policy", default="trimkv")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--context", type=int, default=4096, help="tokens that each row has read")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for the JSON file (default: results)")
    args = parser.parse_args()
    if not dist.is_torchelastic_launched():
        sys.exit("start this with torchrun --nproc-per-node 2")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    else:
        dist.init_process_group("gloo")
    leads, shared = dist.get_rank() == 0, [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    folder = Path(shared[0])
    verdict = [gate(args, folder / "gate")]
    dist.broadcast_object_list(verdict, src=0)
    if not all(one["tokens"] and one["heads"] >= SAME_HEADS for one in verdict[0].values()):
        sys.exit(f"several processes do not do what one does, so nothing is timed: {verdict[0]}")

    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    result, ones = {"shape": args.shape, "policy": args.policy, "budget": args.budget, "context": args.context}, []
    if leads:
        make(TINY if args.shape == "tiny" else SHAPES[args.shape], folder / "model", args.device, dtype)
        model = load(folder / "model", dtype, args.device, several=False)
        ones = [steady(model, rows, args) for rows in args.rows]
        del model
        if args.device == "cuda":
            torch.cuda.empty_cache()
    dist.barrier()
    model = load(folder / "model", dtype, args.device, several=True)
    several = [steady(model, rows, args) for rows in args.rows]
    dist.barrier()
    if leads:
        shutil.rmtree(folder)
        count = dist.get_world_size()
        command = f"torchrun --nproc-per-node {count} benchmarks/tensor_parallel.py {shlex.join(sys.argv[1:])}".strip()
        result |= {"command": command, "processes": count, "gate": verdict[0], "device": args.device}
        result["rows"] = [compare(*pair) for pair in zip(ones, several, strict=True)]
        record.save(f"tensor_parallel_{args.shape}_{args.device}", result, args.output)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # all is said; a process was seen to abort while it took gloo's threads down


if __name__ == "__main__":
    main()
