"""One training step on one very long sequence: peak memory and time, on random weights of Qwen3-4B's shape.

    python benchmarks/long_sequence.py         # 131,072 tokens on one H200: about two minutes

The paper's loss (KL + next token) with gates of width 512 and gradient checkpointing; forward, backward and optimizer.
"""

import argparse
import os
import sys
import time

# Layers of 100 GB leave gaps of tens of GB between blocks of fixed size.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from record import save

import trimkv
from trimkv.bench.models import build
from trimkv.bench.shapes import SHAPES
from trimkv.gates.attach import new_gates
from trimkv.train.config import GateConfig
from trimkv.train.student import Student

SHAPE = "qwen3-4b"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=SHAPES[SHAPE]["num_hidden_layers"])
    parser.add_argument("--name", default="long_sequence")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures training on a GPU: no CUDA device found")
    model = build(SHAPE, "cuda", torch.bfloat16, gates=False, layers=args.layers)
    config = GateConfig.paper(context=args.tokens, budget=4096)
    trimkv.attach(model, new_gates(model, "rg", config.intermediate_size, args.tokens))
    weights_gb = torch.cuda.memory_allocated() / 1e9
    student = Student(model, config)
    student.train()
    student.begin_step(0)
    parameters = sum(student.gate_parameters(), [])
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, eps=config.epsilon)
    ids = torch.randint(0, model.config.vocab_size, (1, args.tokens), device="cuda")
    short = student(ids[:, :2048])  # compiles the kernels
    short["loss"].backward()
    optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    out = student(ids)
    torch.cuda.synchronize()
    forward = time.perf_counter()
    out["loss"].backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
    optimizer.step()
    torch.cuda.synchronize()
    end = time.perf_counter()
    if not (torch.isfinite(norm) and norm > 0):
        sys.exit(f"the gradient's norm is {norm}: no numbers")
    result = {
        "tokens": args.tokens,
        "shape": {**SHAPES[SHAPE], "num_hidden_layers": args.layers},
        "weights_gb": round(weights_gb, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "forward_seconds": round(forward - begin, 1),
        "step_seconds": round(end - begin, 1),
        "tokens_per_second": round(args.tokens / (end - begin)),
        "loss": float(out["loss"]),
        "gradient_norm": float(norm),
    }
    save(args.name, result)


if __name__ == "__main__":
    main()
