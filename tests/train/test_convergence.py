"""A training with the fused kernels goes where the one without them goes: their gradients are right where it matters.

On the CPU the kernels run in Triton's interpreter, in a process of its own (interpreter.py); on a GPU they
run as they are, for a hundred steps.
"""

import inspect
from functools import partial

import pytest
import torch

import interpreter
import tiny
from trimkv.attention.decay import decayed_attention
from trimkv.attention.retention_sum import retention_sum
from trimkv.attention.soft_eviction import soft_eviction_attention
from trimkv.train import student as student_module
from trimkv.train.config import GateConfig
from trimkv.train.trainer import train

INTERPRETED = interpreter.INTERPRETED
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_kernels_in_the_interpreter")
FUNCTIONS = {f.__name__: f for f in (decayed_attention, retention_sum, soft_eviction_attention)}
# as the interpreter takes its time
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
FUSED = {name for name, function in FUNCTIONS.items() if "implementation" in inspect.signature(function).parameters}


class Texts(torch.utils.data.Dataset):
    """Tokens that recur, packed: every second sample holds two documents."""

    def __init__(self, context):
        self.context = context

    def __len__(self):
        return 1024

    def __getitem__(self, index):
        T = self.context
        ids = tiny.tokens(1, T // 4, seed=index)[0].repeat(4)[torch.arange(T)]
        start, labels = torch.zeros(T, dtype=torch.long), ids.clone()
        if index % 2:
            start[T // 3 :] = T // 3
        labels[start == torch.arange(T)] = -100
        return {"input_ids": ids, "labels": labels, "start": start, "mask": torch.ones(T, dtype=torch.bool)}


def curve(implementation, stage, context, steps, folder, monkeypatch, device="cpu", dtype=torch.float32):
    """What is logged at every step, with all attention and sums of this implementation."""
    used = set()

    def forced(name, *arguments, **options):
        used.add(name)
        return FUNCTIONS[name](*arguments, **options, implementation=implementation)

    for name in FUSED:
        monkeypatch.setattr(student_module, name, partial(forced, name))
    config = GateConfig(
        budget=context // 8,
        context=context,
        steps=steps,
        batch_size=1,
        stage=stage,
        intermediate_size=16,
        warmup_steps=0,
        learning_rate=1e-2,
        bias_learning_rate=2 / steps,
        budgets=(max(2, context // 16), context // 2),
    )
    model = tiny.build("qwen3", **SMALL).to(device=device, dtype=dtype)
    history = train(model, Texts(context), config, folder / implementation)["history"]
    assert "retention_sum" in used and (stage == "eviction" or "decayed_attention" in used)
    return history


def largest_difference(context, steps, stage, folder, monkeypatch, **where):
    """Of the losses, relative to their mean over the curve: where no head exceeds the budget any more, capacity is 0.

    The curve itself has to move, or its equality says nothing.
    """
    torch_path = curve("torch", stage, context, steps, folder, monkeypatch, **where)
    kernels = curve("triton", stage, context, steps, folder, monkeypatch, **where)
    assert torch_path[-1]["capacity"] < 0.95 * torch_path[0]["capacity"]
    names = ("loss", "kl", "capacity", "occupancy")
    size = {name: sum(abs(b[name]) for b in torch_path) / steps for name in names}
    pairs = zip(kernels, torch_path, strict=True)
    return max(abs(a[name] - b[name]) / size[name] for a, b in pairs for name in names)


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    interpreter.run_interpreted_tests(__file__)


@interpreted
@pytest.mark.parametrize("stage", ["decay", "eviction"])
def test_interpreted_kernels_give_the_same_curve(stage, tmp_path, monkeypatch):
    assert largest_difference(40, 4, stage, tmp_path, monkeypatch) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["decay", "eviction"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_a_hundred_steps_on_a_gpu(stage, dtype, limit, tmp_path, monkeypatch):
    assert largest_difference(512, 100, stage, tmp_path, monkeypatch, device="cuda", dtype=dtype) < limit
