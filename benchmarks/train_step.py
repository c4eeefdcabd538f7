"""Tokens per second of gate training: whole optimizer steps of the Trainer, on random weights of smollm2's shape.

    python benchmarks/train_step.py            # one GPU, about two minutes, most of it compiling

8 rows of 2,048 tokens a step, bf16, gates of width 160. The median of the steps after the tenth; what compiling and
capturing took before is reported beside it.
"""

import argparse
import statistics
import sys
import tempfile
import time

import torch
from record import save
from shapes import SMOLLM2
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from trimkv.train.config import GateConfig
from trimkv.train.trainer import train

HOW = {
    "plain": {},
    "cuda_graph": {"checkpointing": False, "cuda_graph": True},
    "cuda_graph+compile": {"checkpointing": False, "cuda_graph": True, "compile": True},
}


class RandomTokens(torch.utils.data.Dataset):
    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        ids = torch.randint(0, SMOLLM2["vocab_size"], (2048,), generator=torch.Generator().manual_seed(index))
        start, mask = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
        return {"input_ids": ids, "labels": ids, "start": start, "mask": mask}


class Clock(TrainerCallback):
    def __init__(self):
        self.times = [time.perf_counter()]

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def measure(stage: str, how: dict, steps: int) -> dict:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to("cuda", torch.bfloat16)
    config = GateConfig(stage=stage, steps=steps, batch_size=8, intermediate_size=160, **how)
    clock = Clock()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        train(model, RandomTokens(), config, folder, callbacks=[clock])
    took = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    step = statistics.median(took[10:])
    return {
        "stage": stage,
        **{"checkpointing": True, "cuda_graph": False, "compile": False, **how},
        "step_ms": round(step * 1e3, 1),
        "tokens_per_second": round(config.batch_size * config.context / step),
        "first_step_seconds": round(took[0], 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--stages", default="decay,eviction")
    parser.add_argument("--how", default=",".join(HOW))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures training on a GPU: no CUDA device found")
    torch.set_float32_matmul_precision("high")
    rows = []
    for stage in args.stages.split(","):
        for how in args.how.split(","):
            rows.append({"how": how, **measure(stage, HOW[how], args.steps)})
            print(rows[-1], file=sys.stderr, flush=True)
    save("train_step", {"rows": rows, "shape": SMOLLM2})


if __name__ == "__main__":
    main()
