"""The end of a step in two launches, or four with top-k and top-p: the token of each row is chosen and taken in.

What ``sampling.choose`` and ``Rows.advance`` do in forty small launches, which is a good part of a layer. The first
kernel looks at a block of a row's logits, the second joins a row's blocks and ends the row where its last token came.
"""

import torch
import triton
import triton.language as tl

from .limits_triton import adjust, adjusted_and_lowest
from .request import DRAWN, ERROR, GREEDY, LENGTH, LIMITED, RUNNING, STOP
from .rows import NO_ID, Rows
from .sampling import MIX32, MIX64, ODD

BLOCK = 2048  # logits that a program looks at
NONE = tl.constexpr(NO_ID)
GOES_ON, STOPPED, AT_LIMIT, UNSOUND = (tl.constexpr(reason) for reason in (RUNNING, STOP, LENGTH, ERROR))
IS_GREEDY, IS_DRAWN, IS_LIMITED = (tl.constexpr(kind) for kind in (GREEDY, DRAWN, LIMITED))
MIX32_A, MIX32_B = (tl.constexpr(number) for number in MIX32)
MIX64_A, MIX64_B, STEP = (tl.constexpr(number) for number in (*MIX64, ODD))


def choose_and_advance(logits_BV: torch.Tensor, rows: Rows, kind: str) -> None:
    """``rows.advance(*choose(logits_BV, rows, kind))``."""
    (B, V), device = logits_BV.shape, logits_BV.device
    x, lowest = logits_BV, None
    if kind == LIMITED:
        x, lowest = adjusted_and_lowest(logits_BV, rows)
    assert x.stride(1) == 1 and rows.seen.stride(1) == rows.stops.stride(1) == rows.report.stride(1) == 1
    blocks = triton.cdiv(V, BLOCK)
    best = torch.empty(B, blocks, dtype=torch.float32, device=device)
    index = torch.empty(B, blocks, dtype=torch.int32, device=device)
    seen, active = rows.seen.view(torch.uint8), rows.active.view(torch.uint8)
    with torch.cuda.device_of(logits_BV):
        _best_kernel[(B, blocks)](
            *(x, seen, rows.penalty, rows.temperature, rows.seed, rows.produced, lowest, best, index),
            *(V, x.stride(0), seen.stride(0)),
            KIND=kind,
            BLOCK=BLOCK,
            num_warps=4,
        )
        _advance_kernel[(B,)](
            *(best, index, rows.token, rows.position, active, rows.produced, rows.limit, rows.stops, seen),
            *(rows.report, blocks, seen.stride(0), rows.stops.stride(0), rows.report.stride(0)),
            STOPS=rows.stops.shape[1],
            BLOCKS=triton.next_power_of_2(blocks),
            num_warps=1,
        )


@triton.jit
def _mix32(x):
    x = (x ^ ((x >> 16) & 0xFFFF)) * MIX32_A
    x = (x ^ ((x >> 13) & 0x7FFFF)) * MIX32_B
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _mix64(x):
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * MIX64_A
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * MIX64_B
    return x ^ ((x >> 33) & 0x7FFFFFFF)


@triton.jit
def _gumbel(seed, step, i):
    """``sampling.gumbel`` of the tokens i."""
    key = _mix64(_mix64(seed) + (step.to(tl.int64) + 1) * STEP)
    low, high = key.to(tl.int32), (key >> 32).to(tl.int32)
    bits = _mix32(_mix32(i + low) ^ high)
    uniform = (((bits >> 9) & 0x7FFFFF).to(tl.float32) + 0.5) * (1.0 / 8388608)
    return -tl.log(-tl.log(uniform))


@triton.jit
def _best_kernel(
    x, seen, penalty, temperature, seed, produced, lowest, best, index, V, x_b, seen_b,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs [row, block]: the largest of a block and where it is; NaN if there is one."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < V
    value = tl.load(x + row * x_b + i, mask=inside, other=float("-inf")).to(tl.float32)
    if KIND != IS_GREEDY:
        warmth = tl.load(temperature + row)
        if KIND == IS_DRAWN:
            occurred = tl.load(seen + row * seen_b + i, mask=inside, other=0) != 0
            value = adjust(value, occurred, tl.load(penalty + row), warmth)
        drawn = value
        if KIND == IS_LIMITED:
            drawn = tl.where(value < tl.load(lowest + row), float("-inf"), value)
        drawn += _gumbel(tl.load(seed + row), tl.load(produced + row), i)
        value = tl.where(warmth > 0, drawn, value)
    is_number = value == value
    sound = tl.min(tl.where(is_number | (i >= V), 1, 0), 0) > 0
    value = tl.where(inside & is_number, value, float("-inf"))
    top = tl.max(value, 0)
    first = tl.min(tl.where((value == top) & inside, i, V), 0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best + at, tl.where(sound, top, float("nan")))
    tl.store(index + at, first)


@triton.jit
def _advance_kernel(
    best, index, token, position, active, produced, limit, stops, seen, report, blocks, seen_b, stops_b, report_b,
    STOPS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Programs [row]: ``Rows.advance`` with the best of a row's blocks."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCKS)
    value = tl.load(best + row * blocks + n, mask=n < blocks, other=float("-inf"))
    where = tl.load(index + row * blocks + n, mask=n < blocks, other=2147483647)
    numbers = tl.min(tl.where(value == value, 1, 0), 0) > 0
    top = tl.max(tl.where(value == value, value, float("-inf")), 0)
    sound = numbers & (top > float("-inf")) & (top < float("inf"))
    chosen = tl.min(tl.where(value == top, where, 2147483647), 0).to(tl.int64)
    was = tl.load(active + row) != 0
    takes = was & sound
    new = tl.where(takes, chosen, tl.load(token + row))
    count = tl.load(produced + row) + was.to(tl.int32)
    ends = tl.load(stops + row * stops_b + tl.arange(0, STOPS))
    reason = tl.where(count >= tl.load(limit + row), AT_LIMIT, GOES_ON)
    reason = tl.where(tl.max((ends == new).to(tl.int32), 0) > 0, STOPPED, reason)
    reason = tl.where(sound, reason, UNSOUND)
    reason = tl.where(was, reason, GOES_ON)
    tl.store(report + row * report_b, tl.where(takes, new, NONE).to(tl.int32))
    tl.store(report + row * report_b + 1, reason)
    tl.store(produced + row, count)
    tl.store(seen + row * seen_b + new, was.to(tl.uint8), mask=was)
    tl.store(token + row, new)
    tl.store(position + row, tl.load(position + row) + was.to(tl.int64))
    tl.store(active + row, (was & (reason == GOES_ON)).to(tl.uint8))
