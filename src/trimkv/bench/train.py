"""What a step of gate training costs: whole optimizer steps of the Trainer."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .measure import Wrong, row
from .models import build

# System -> how a step is run.
SYSTEMS = {
    "plain": {},
    "cuda-graph": {"checkpointing": False, "cuda_graph": True},
    "cuda-graph+compile": {"checkpointing": False, "cuda_graph": True, "compile": True},
}
SETTLED = 3  # steps that are not counted: they compile and allocate


@dataclass
class Options:
    """What is measured: steps of ``batches`` rows of ``contexts`` tokens, with the gates' training budget."""

    shape: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    budget: int
    systems: tuple[str, ...] = ("plain",)
    steps: int = 12
    stage: str = "decay"


class RandomTokens(torch.utils.data.Dataset):
    """Packed samples of random tokens."""

    def __init__(self, vocabulary: int, tokens: int):
        self.vocabulary, self.tokens = vocabulary, tokens

    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, self.vocabulary, (self.tokens,), generator=generator)
        start, mask = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
        return {"input_ids": ids, "labels": ids, "start": start, "mask": mask}


def measure(options: Options, device: torch.device, dtype: torch.dtype, matmul: float) -> Iterator[dict]:
    """A row for each context, batch and system: the median of the steps after the first few.

    The floor is that of three products with every weight: the teacher's, the student's, and the student's backward
    pass, which makes gradients of activations only. The gate is that the losses are numbers and that the first one is
    that of plain steps.
    """
    losses = {}
    for context in options.contexts:
        for batch in options.batches:
            for system in options.systems:

                def one(system=system, context=context, batch=batch) -> dict:
                    ms, first, linear = _steps(options, system, context, batch, device, dtype)
                    plain = losses.setdefault((context, batch), first)
                    if not abs(first - plain) <= 0.05 * abs(plain) + 1e-6:
                        raise Wrong(f"a first loss of {first:.4g}, where {options.systems[0]} has {plain:.4g}")
                    tokens = batch * context
                    floor = 6 * linear * tokens / matmul * 1e3
                    return {"ms": ms, "tokens_per_second": tokens / ms * 1e3, "floor_ms": floor}

                where = {"context": context, "batch": batch, "budget": options.budget, "stage": options.stage}
                yield row(system, where, one, device)


def _steps(o: Options, system: str, context: int, batch: int, device, dtype) -> tuple[float, float, int]:
    """Milliseconds of a step, the first loss, and the number of weights."""
    from transformers import TrainerCallback

    from ..train.config import GateConfig
    from ..train.trainer import train

    class Clock(TrainerCallback):
        times, losses = [time.perf_counter()], []

        def on_step_end(self, args, state, control, **kwargs):
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    model = build(o.shape, str(device), dtype, gates=False)
    linear = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    steps = max(o.steps, SETTLED + 1)
    config = GateConfig(
        stage=o.stage, steps=steps, batch_size=batch, context=context, budget=o.budget, **SYSTEMS[system]
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, RandomTokens(model.config.vocab_size, context), config, folder, callbacks=[clock])
    took = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    first = next(entry["loss"] for entry in result["history"] if "loss" in entry)
    return statistics.median(took[SETTLED:]) * 1e3, first, linear
