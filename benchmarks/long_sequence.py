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
from transformers import Qwen3Config, Qwen3ForCausalLM

import trimkv
from trimkv.gates.attach import new_gates
from trimkv.train.config import GateConfig
from trimkv.train.student import Student

QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "rope_theta": 5e6,
    "tie_word_embeddings": True,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=QWEN3_4B["num_hidden_layers"])
    parser.add_argument("--name", default="long_sequence")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures training on a GPU: no CUDA device found")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(Qwen3Config(**{**QWEN3_4B, "num_hidden_layers": args.layers}))
    torch.set_default_dtype(torch.float32)
    config = GateConfig.paper(context=args.tokens, budget=4096)
    trimkv.attach(model, new_gates(model, "rg", config.intermediate_size, args.tokens))
    weights_gb = torch.cuda.memory_allocated() / 1e9
    student = Student(model, config)
    student.train()
    student.begin_step(0)
    parameters = sum(student.gate_parameters(), [])
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, eps=config.epsilon)
    ids = torch.randint(0, QWEN3_4B["vocab_size"], (1, args.tokens), device="cuda")
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
        "shape": {**QWEN3_4B, "num_hidden_layers": args.layers},
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
