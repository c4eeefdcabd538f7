"""A step replayed as a CUDA graph, and one with compiled layers, learn what a plain step learns."""

import pytest
import torch

import tiny
import trimkv
from trimkv.gates.attach import new_gates
from trimkv.train.config import GateConfig
from trimkv.train.losses import _loss
from trimkv.train.student import Student

pytestmark = pytest.mark.gpu
T = 96


def batch(seed):
    ids = tiny.tokens(3, T, seed=seed).cuda()
    start, mask = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
    start[1, 40:], start[2, 90:] = 40, torch.arange(90, T, device="cuda")
    labels = ids.clone()
    labels[1, 40], labels[2, 90:], mask[2, 90:] = -100, -100, False
    return {"input_ids": ids, "labels": labels, "start": start, "mask": mask}


def steps(stage, **changes):
    """Losses and gradients of four different batches."""
    model = tiny.build("llama").cuda()
    trimkv.attach(model, new_gates(model, "rg", 8, T))
    config = GateConfig(
        budget=8, context=T, stage=stage, budgets=(10, 60), losses=("kl", "ntp"), checkpointing=False, **changes
    )
    student = Student(model, config)
    student.train()
    found = []
    for step in range(4):
        student.begin_step(step)
        out = student(**batch(step))
        (out["loss"] * 0.5).backward()
        parameters = sum(student.gate_parameters(), [])
        found.append(
            [out[name].detach() for name in ("kl", "ntp", "capacity", "occupancy")] + [p.grad for p in parameters]
        )
        for parameter in parameters:
            parameter.grad = None
    student.release()
    return found


@pytest.mark.parametrize("stage", ["decay", "eviction"])
@pytest.mark.parametrize("how", [{"cuda_graph": True}, {"compile": True}, {"cuda_graph": True, "compile": True}])
def test_losses_and_gradients_are_those_of_a_plain_step(stage, how):
    for ours, plain in zip(steps(stage, **how), steps(stage), strict=True):
        for a, b in zip(ours, plain, strict=True):
            assert (a - b).norm() <= 2e-3 * b.norm() + 1e-7, (a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [77, 49152])
def test_the_fused_loss_is_that_of_the_formula(dtype, V):
    from trimkv.train.losses_triton import loss_and_gradient

    student, teacher = (torch.randn(33, V, device="cuda", dtype=dtype) * 3 for _ in range(2))
    targets, weight = torch.randint(0, V, (33,), device="cuda"), torch.rand(33, device="cuda")
    for kind in ("kl", "ntp"):
        leaf = student.double().requires_grad_()
        expect = _loss(kind, leaf, teacher.double(), targets)
        (expect @ weight).backward()  # in fp32, as the formula is
        loss, gradient = loss_and_gradient(kind, student, teacher, targets, weight)
        assert (loss - expect).norm() < 1e-5 * expect.norm()
        assert (gradient - leaf.grad).norm() < (1e-5 if dtype == torch.float32 else 5e-3) * leaf.grad.norm()
