"""Decayed attention on a GPU against torch's flash attention, which has no decay, and FlexAttention, which can have it.

Same shapes, same process. Retention sums of a whole model beside the attention of a whole training step.

    python benchmarks/decay_attention.py       # about a minute on an H100, most of it compiling

Nothing is timed unless the kernels' outputs and gradients equal the torch path's on a shorter sequence.
"""

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from record import save
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimkv.attention.decay import decayed_attention
from trimkv.attention.retention_sum import retention_sum
from trimkv.bench.measure import event_milliseconds

SHAPES = {  # rows, tokens, query heads, KV heads, head dim
    "long": (1, 16384, 32, 8, 128),
    "smollm2": (8, 2048, 9, 3, 64),
}
TOLERANCE = 2e-2  # relative RMS, bf16
GROWTH = (4096, 8192, 16384, 32768, 65536)


def inputs(B, T, Q, H, D, packed=False):
    """q, k, v, log_beta with gradients, start (documents of about 1,000 tokens, or None), and the output's gradient."""
    q, dout = (torch.randn(B, T, Q, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    log_beta = F.logsigmoid(torch.randn(B, H, T, device="cuda") + 6)
    first = torch.rand(B, T, device="cuda") < 1e-3
    first[:, 0] = True
    start = torch.where(first, torch.arange(T, device="cuda"), 0).cummax(1).values if packed else None
    return [x.requires_grad_() for x in (q, k, v, log_beta)], start, dout


def gate(B, T, Q, H, D) -> float:
    """The largest relative RMS error of output and gradients, packed and not. Exits if it is too large."""
    worst = 0.0
    for packed in (False, True):
        tensors, start, dout = inputs(B, min(T, 1500), Q, H, D, packed)
        pair = []
        for implementation in ("triton", "torch"):
            out = decayed_attention(*tensors, D**-0.5, start, implementation=implementation)
            pair.append((out, *torch.autograd.grad(out, tensors, dout)))
        for a, b in zip(*pair, strict=True):
            error = ((a.float() - b.float()).norm() / b.float().norm()).item()
            if not error < TOLERANCE:
                sys.exit(f"wrong at B {B} Q {Q} H {H} D {D} packed {packed}: relative error {error:.1e}. No times.")
            worst = max(worst, error)
    return worst


def timed(attend, tensors, dout, repeat: int) -> dict:
    def both():
        torch.autograd.grad(attend(), tensors, dout)

    with torch.no_grad():
        forward = event_milliseconds(attend, repeat)
    return {"forward_ms": round(forward, 3), "forward_backward_ms": round(event_milliseconds(both, repeat), 3)}


def measure(shape, repeat: int) -> dict:
    error = gate(*shape)
    tensors, _, dout = inputs(*shape)
    _, packed, _ = inputs(*shape, packed=True)
    scaling = shape[-1] ** -0.5

    def flash():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*tensors[:3], is_causal=True, scale=scaling, enable_gqa=True)

    begin = time.perf_counter()
    result = {
        "shape": dict(zip(("rows", "tokens", "query_heads", "kv_heads", "head_dim"), shape, strict=True)),
        "largest_relative_error": error,
        "sdpa_flash": timed(flash, tensors[:3], dout, repeat),
        "decay": timed(lambda: decayed_attention(*tensors, scaling), tensors, dout, repeat),
        "decay_packed": timed(lambda: decayed_attention(*tensors, scaling, packed), tensors, dout, repeat),
    }
    result["decay_over_sdpa"] = {
        key.removesuffix("_ms"): round(result["decay"][key] / result["sdpa_flash"][key], 2) for key in result["decay"]
    }
    result["seconds_spent"] = round(time.perf_counter() - begin, 1)
    return result


def flex(shape, repeat: int) -> dict:
    """FlexAttention with the decay as score_mod, all four gradients: torch's own way to the same result."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, T, Q, H, D = shape
    tensors, _, dout = inputs(*shape)
    q, k, v, log_beta = tensors
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cuda")
    compiled = torch.compile(flex_attention)

    def attend():
        def decayed(score, b, h, i, j):
            return score + (i - j) * log_beta[b, h // (Q // H), j]

        return compiled(q, k, v, score_mod=decayed, block_mask=block_mask, scale=D**-0.5, enable_gqa=True)

    with torch.no_grad():
        ours, theirs = decayed_attention(*tensors, D**-0.5), attend()
    error = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    return {"relative_difference_to_decay": error, **timed(attend, tensors, dout, repeat)}


def sums(layers: int = 36) -> dict:
    """Retention sums of ``layers`` layers, forward and backward, against the attention of a step with checkpointing:
    teacher, student and recomputation forward, one backward."""
    B, T, Q, H, D = SHAPES["long"]
    tensors, _, dout = inputs(B, T, Q, H, D)
    attention = timed(lambda: decayed_attention(*tensors, D**-0.5), tensors, dout, 5)
    log_beta = F.logsigmoid(torch.randn(B, layers * H, T, device="cuda") + 6).requires_grad_()
    weight = torch.randn_like(log_beta)
    took = timed(lambda: retention_sum(log_beta), (log_beta,), weight, 5)
    step = layers * (2 * attention["forward_ms"] + attention["forward_backward_ms"])
    share = took["forward_backward_ms"] / step
    return {
        "layers": layers,
        "kv_heads": H,
        "tokens": T,
        **took,
        "attention_ms": round(step, 1),
        "share": round(share, 3),
    }


def growth() -> dict:
    """Memory that forward + backward take above the inputs, and milliseconds, at the long shape's heads."""
    found = {}
    _, _, Q, H, D = SHAPES["long"]
    for T in GROWTH:
        tensors, _, dout = inputs(1, T, Q, H, D)

        def run(tensors=tensors, dout=dout):
            torch.autograd.grad(decayed_attention(*tensors, D**-0.5), tensors, dout)

        run()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
        found[T] = {
            "mb_above_inputs": round(peak / 1e6, 1),
            "forward_backward_ms": round(event_milliseconds(run, 3), 2),
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures GPU kernels: no CUDA device found")
    torch.manual_seed(0)
    result = {name: measure(shape, args.repeat) for name, shape in SHAPES.items()}
    result["long"]["flex_attention"] = flex(SHAPES["long"], 5)
    save("decay_attention", {**result, "retention_sums": sums(), "growth": growth()})


if __name__ == "__main__":
    main()
