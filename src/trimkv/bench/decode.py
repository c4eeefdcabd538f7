"""What one token per row costs with a context behind it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from ..attention import reference
from ..attention.register import NAME
from ..cache import fused
from ..cache.build import bounded_cache
from ..cache.graph import DecodeStep
from ..cache.prefill import prefill
from ..hf.calls import with_cache
from . import fill
from .measure import Wrong, milliseconds, row
from .models import step_weights, token_bytes

SYSTEMS = ("stock-dynamic", "stock-static", "full", "trimkv-compiled", "trimkv")
SLOTS = {"full": "full", "trimkv-compiled": "trimkv", "trimkv": "trimkv"}  # system -> policy of our own slots
GATE_PROMPT, GATE_STEPS = 48, 8  # the text by which a system shows that it is right, before it is timed
# Relative RMS of logits. Two correct bf16 runs of a deep random model differ by a few hundredths, a wrong one by 1.4.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass
class Options:
    """What is measured.

    Attributes:
        contexts: tokens behind the first measured one.
        batches: rows.
        budget: M of systems trimkv and trimkv-compiled.
        systems: of SYSTEMS.
        steps: decode steps of one timing; the median of ``repeat`` counts.
        compile: torch.compile for the small parts of our own systems, where they are not fused.
        overlap: gates beside the projections (cache/graph.py), likewise.
        fused: whole layers as a few launches in our own systems, but for trimkv-compiled.
    """

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    budget: int
    systems: tuple[str, ...] = SYSTEMS
    steps: int = 32
    repeat: int = 3
    compile: bool = False
    overlap: bool = False
    fused: bool = False

    def step(self, model, cache, system: str) -> DecodeStep:
        fused = self.fused and system != "trimkv-compiled"
        return DecodeStep(model, cache, compile=self.compile, overlap=self.overlap, fused=fused)


@torch.no_grad()
def measure(model, options: Options, bandwidth: float) -> Iterator[dict]:
    """A row for each context, batch and system, as they are done."""
    wrong = {system: _error(model, system, options) for system in options.systems}
    for context in options.contexts:
        for batch in options.batches:
            where = {"context": context, "batch": batch, "budget": options.budget}
            for system in options.systems:

                def one(system=system, context=context, batch=batch) -> dict:
                    if wrong[system]:
                        raise wrong[system]
                    return _time(model, system, context, batch, options, bandwidth)

                yield row(system, where, one, model.device)


def _time(model, system: str, context: int, batch: int, o: Options, bandwidth: float) -> dict:
    step = _prepared(model, system, context, batch, o)
    token = torch.randint(3, model.config.vocab_size, (batch,), device=model.device)

    def steps() -> None:
        following = token
        for _ in range(o.steps):
            following = step(following).argmax(-1)

    total = milliseconds(steps, model.device, o.repeat)
    ms = total / o.steps
    held = min(context, o.budget) if SLOTS.get(system) == "trimkv" else context
    floor = (step_weights(model) + batch * held * token_bytes(model)) / bandwidth * 1e3
    return {"ms": ms, "tokens_per_second": batch / ms * 1e3, "floor_ms": floor}


def _prepared(model, system: str, context: int, batch: int, o: Options):
    """A function that takes a token per row, int64 [B], and gives logits [B, V]."""
    room = context + (o.repeat + 2) * o.steps
    if system in SLOTS:
        policy = SLOTS[system]
        cache = bounded_cache(model, policy, room if policy == "full" else o.budget, rows=batch)
        fill.bounded(cache, context)
        return o.step(model, cache, system)
    _stock(model)
    if system == "stock-dynamic":
        return _stepper(model, fill.dynamic(model, batch, context))
    return _stepper(model, fill.static(model, batch, context, room), compiled=model.device.type == "cuda")


def _stock(model) -> None:
    """Stock attention; a bounded cache selects ours again when it is made."""
    hooks = getattr(model, "_trimkv_hooks", None)
    if hooks is not None:
        hooks.remove(model)
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def _stepper(model, cache, compiled: bool = False):
    forward = model.forward
    if compiled:
        torch.compiler.reset()
        forward = torch.compile(forward, mode="reduce-overhead", dynamic=False)

    def step(token_B: torch.Tensor) -> torch.Tensor:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        out = forward(input_ids=token_B[:, None], use_cache=True, **with_cache(model, cache))
        return out.logits[:, -1].clone() if compiled else out.logits[:, -1]

    return step


def _error(model, system: str, o: Options) -> Exception | None:
    """What is wrong with a system; None if its logits are those that they must be.

    Stock systems and full slots: those of the stock cache in eager mode, after a prompt. The budget of trimkv is
    exceeded: those of the same cache in plain steps, which the tests compare with loops over the formula.
    """
    try:
        if system == "stock-dynamic":
            return None  # it is what the others are compared with
        got, expect = _gate(model, system, o)
    except (ValueError, torch.OutOfMemoryError) as error:  # said in this system's rows, and the others go on
        return type(error)(str(error))  # without a traceback, which would hold what this system allocated
    except Exception as error:
        return Wrong(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    error = reference.relative_error(got, expect)
    return None if error < TOLERANCE[model.dtype] else Wrong(f"logits differ by {error:.2g} (relative)")


def _gate(model, system: str, o: Options) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(3, model.config.vocab_size, (2, GATE_PROMPT + GATE_STEPS), device=model.device)
    prompt, rest = text[:, :GATE_PROMPT], text[:, GATE_PROMPT:].unbind(1)
    if SLOTS.get(system) == "trimkv":
        M = min(o.budget, GATE_PROMPT // 2)
        read = [bounded_cache(model, "trimkv", M, chunk=16) for _ in range(2)]
        prefill(model, read[0], prompt, chunk=16)
        with fused.plain_torch():
            prefill(model, read[1], prompt, chunk=16)
        static = bounded_cache(model, "trimkv", M, rows=2)
        for b in range(2):
            static.copy_row(read[0], b, b)
        step = o.step(model, static, system)
        got = torch.stack([step(token).clone() for token in rest])
        with fused.plain_torch():
            plain = [model(token[:, None], **with_cache(model, read[1])).logits[:, -1] for token in rest]
        return got, torch.stack(plain)
    _stock(model)
    stock = DynamicCache(config=model.config)
    model(prompt, **with_cache(model, stock))
    expect = torch.stack([model(token[:, None], **with_cache(model, stock)).logits[:, -1] for token in rest])
    if system == "stock-static":
        cache = fill.static(model, 2, 0, GATE_PROMPT + GATE_STEPS)
        model(prompt, **with_cache(model, cache))
        step = _stepper(model, cache)
    else:
        cache = bounded_cache(model, "full", GATE_PROMPT + GATE_STEPS, rows=2)
        prefill(model, cache, prompt, chunk=16)
        step = o.step(model, cache, system)
    return torch.stack([step(token).clone() for token in rest]), expect
