"""Top-k and top-p without sorting a vocabulary: ``sampling.adjusted`` and ``sampling.lowest_kept`` in two launches.

The first kernel writes adjusted logits and, of every few neighbours, the largest. The k-th largest of those maxima is a
bound that at least k logits reach, and hardly more: the second kernel, one program a row, collects the logits that do
and looks among them for the lowest that may be drawn, by halving the range of their numbers.

B rows, V logits in a row, N groups of neighbours.
"""

import torch
import triton
import triton.language as tl

from .request import MAX_TOP_K
from .rows import Rows

BLOCK = 2048  # logits that a program of the first kernel looks at
GROUPS = 16384  # the most groups of a row: as many as a program holds in registers
CANDIDATES = 4096  # that a program holds; a row with more that reach the bound is read as a whole, slowly
MOST = tl.constexpr(MAX_TOP_K)
LOW, HIGH = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


def adjusted_and_lowest(logits_BV: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [B, V], logits after penalty and temperature, and fp32 [B], the lowest of a row that may be drawn.

    Where logits are no numbers, the second is anything.
    """
    (B, V), device = logits_BV.shape, logits_BV.device
    assert logits_BV.stride(1) == 1 and rows.seen.stride(1) == 1
    seen = rows.seen.view(torch.uint8)
    group = triton.next_power_of_2(triton.cdiv(V, GROUPS))
    blocks, groups = triton.cdiv(V, BLOCK), triton.cdiv(V, group)
    x = torch.empty(B, V, dtype=torch.float32, device=device)
    most = torch.empty(B, groups, dtype=torch.float32, device=device)
    parts = torch.empty(B, 2, blocks, dtype=torch.float32, device=device)
    lowest = torch.empty(B, dtype=torch.float32, device=device)
    taken = torch.empty(B, groups, dtype=torch.int32, device=device)
    reached = torch.empty(B, CANDIDATES, dtype=torch.float32, device=device)
    with torch.cuda.device_of(logits_BV):
        _adjust_kernel[(B, blocks)](
            *(logits_BV, seen, rows.penalty, rows.temperature, x, most, parts),
            *(V, groups, logits_BV.stride(0), seen.stride(0)),
            GROUP=group,
            BLOCK=BLOCK,
            num_warps=4,
        )
        _lowest_kernel[(B,)](
            *(x, most, parts, rows.temperature, rows.top_k, rows.top_p, taken, reached, lowest),
            *(V, groups, blocks),
            GROUP=group,
            GROUPS=triton.next_power_of_2(groups),
            BLOCKS=triton.next_power_of_2(blocks),
            CANDIDATES=CANDIDATES,
            num_warps=16,
        )
    return x, lowest


@triton.jit
def adjust(value, occurred, factor, warmth):
    """``sampling.adjusted`` of a row's logits."""
    punished = tl.where(value > 0, tl.math.div_rn(value, factor + tl.zeros_like(value)), value * factor)
    value = tl.where(occurred, punished, value)
    return tl.math.div_rn(value, tl.where(warmth > 0, warmth, 1.0) + tl.zeros_like(value))


@triton.jit
def _rank(value):
    """int32 that compare as the floats do."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ranked(rank):
    """The float of a rank."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _adjust_kernel(
    logits, seen, penalty, temperature, x, most, parts, V, groups, logits_b, seen_b,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs [row, block]: adjusted logits, the largest of each group, and the block's maximum and sum of exp."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < V
    value = tl.load(logits + row * logits_b + i, mask=inside, other=float("-inf")).to(tl.float32)
    occurred = tl.load(seen + row * seen_b + i, mask=inside, other=0) != 0
    value = adjust(value, occurred, tl.load(penalty + row), tl.load(temperature + row))
    tl.store(x + row * V + i, value, mask=inside)
    value = tl.where(inside & (value == value), value, float("-inf"))
    n = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(most + row * groups + n, tl.max(tl.reshape(value, (BLOCK // GROUP, GROUP)), 1), mask=n < groups)
    top = tl.max(value, 0)
    part = parts + row * 2 * tl.num_programs(1) + block
    tl.store(part, top)
    tl.store(part + tl.num_programs(1), tl.sum(tl.exp(value - tl.maximum(top, -3.0e38)), 0))


@triton.jit
def _middle(low, high):
    """Half way between two ranks, whose sum may be no int32."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _half(low, high, middle, found):
    """The half in which the least rank lies for which something is ``found``, as it is for all above it."""
    return tl.where(found, low, middle + 1), tl.where(found, middle, high)


@triton.jit
def _nth_rank(ranks, n):
    """The n-th largest of these ranks, or LOW where there are fewer: the least rank with fewer than n above it."""
    low, high = tl.full((), LOW, tl.int32), tl.full((), HIGH, tl.int32)
    for _ in range(32):
        middle = _middle(low, high)
        enough = tl.sum((ranks > middle).to(tl.int32), 0) < n
        low, high = _half(low, high, middle, enough)
    return high


@triton.jit
def _nucleus_rank(ranks, top, mass):
    """The least rank with less than ``mass`` above it, in units of exp(``top``)."""
    low, high = tl.full((), LOW, tl.int32), tl.full((), HIGH, tl.int32)
    share = tl.exp(_ranked(ranks) - top)
    for _ in range(32):
        middle = _middle(low, high)
        little = tl.sum(tl.where(ranks > middle, share, 0.0), 0) < mass
        low, high = _half(low, high, middle, little)
    return high


@triton.jit
def _above(x, V, rank, top, TILE: tl.constexpr):
    """How many logits of a row rank above this, and their sum of exp(logit - ``top``)."""
    count, mass = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.float32)
    for start in range(0, V, TILE):
        i = start + tl.arange(0, TILE)
        value = tl.load(x + i, mask=i < V, other=float("-inf"))
        higher = (_rank(value) > rank) & (i < V)
        count += higher.to(tl.int32)
        mass += tl.where(higher, tl.exp(value - top), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _lowest_kernel(
    x, most, parts, temperature, top_k, top_p, taken, reached, lowest, V, groups, blocks,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Programs [row]: ``sampling.lowest_kept``; -inf where nothing is drawn."""
    row = tl.program_id(0).to(tl.int64)
    k, p, warmth = tl.load(top_k + row).to(tl.int32), tl.load(top_p + row), tl.load(temperature + row)
    found = tl.full((), float("-inf"), tl.float32)
    if (warmth > 0) & ((k > 0) | (p < 1)):
        x += row * V
        taken += row * groups
        reached += row * CANDIDATES
        n = tl.where(k > 0, tl.minimum(k, MOST), MOST)
        # A bound that at least n logits reach, and the groups with one that does.
        g = tl.arange(0, GROUPS)
        maxima = tl.load(most + row * groups + g, mask=g < groups, other=float("-inf"))
        bound = _nth_rank(tl.where(g < groups, _rank(maxima), LOW), n)
        bound = tl.maximum(bound, _rank(tl.full((), float("-inf"), tl.float32)) + 1)  # masked ones have no share
        reaches = (g < groups) & (_rank(maxima) >= bound)
        tl.store(taken + tl.cumsum(reaches.to(tl.int32), 0) - 1, g, mask=reaches)
        number = tl.sum(reaches.to(tl.int32), 0)
        tl.debug_barrier()
        # The logits that do, one after the other.
        TILE: tl.constexpr = CANDIDATES // GROUP
        held = 0
        for start in range(0, number, TILE):
            t = start + tl.arange(0, CANDIDATES) // GROUP
            i = tl.load(taken + t, mask=t < number, other=0) * GROUP + tl.arange(0, CANDIDATES) % GROUP
            inside = (t < number) & (i < V)
            value = tl.load(x + i, mask=inside, other=float("-inf"))
            higher = inside & (value == value) & (_rank(value) >= bound)
            at = held + tl.cumsum(higher.to(tl.int32), 0) - 1
            tl.store(reached + at, value, mask=higher & (at < CANDIDATES))
            held += tl.sum(higher.to(tl.int32), 0)
        tl.debug_barrier()
        # The row's softmax, in units of exp(top).
        b = tl.arange(0, BLOCKS)
        part = parts + row * 2 * blocks + b
        tops = tl.load(part, mask=b < blocks, other=float("-inf"))
        sums = tl.load(part + blocks, mask=b < blocks, other=0.0)
        top = tl.maximum(tl.max(tops, 0), -3.0e38)
        whole = tl.sum(sums * tl.exp(tl.maximum(tops, -3.0e38) - top), 0)
        if held <= CANDIDATES:
            c = tl.arange(0, CANDIDATES)
            value = tl.load(reached + c, mask=c < held, other=float("-inf"))
            ranks = tl.where(c < held, _rank(value), LOW)
            last = _nth_rank(ranks, n)
            above = (ranks > last) & (c < held)
            among = tl.sum(tl.where(above, tl.exp(value - top), 0.0), 0)
            among += (n - tl.sum(above.to(tl.int32), 0)) * tl.exp(_ranked(last) - top)
            mass = tl.where(k > 0, tl.where(held < n, whole, among), whole)
            rank = tl.where(p < 1, tl.maximum(last, _nucleus_rank(ranks, top, p * mass)), last)
        else:
            low, high = tl.full((), LOW, tl.int32), tl.full((), HIGH, tl.int32)
            for _ in range(32):
                middle = _middle(low, high)
                count, _mass = _above(x, V, middle, top, CANDIDATES)
                low, high = _half(low, high, middle, count < n)
            last = high
            count, among = _above(x, V, last, top, CANDIDATES)
            among += (n - count) * tl.exp(_ranked(last) - top)
            mass = p * tl.where(k > 0, among, whole)
            low, high = last, tl.full((), HIGH, tl.int32)
            for _ in range(32):
                middle = _middle(low, high)
                _count, above_mass = _above(x, V, middle, top, CANDIDATES)
                little = (above_mass < mass) | (p >= 1)
                low, high = _half(low, high, middle, little)
            rank = high
        found = tl.where(rank == LOW, float("-inf"), _ranked(rank))
    tl.store(lowest + row, found)
