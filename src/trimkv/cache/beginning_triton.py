"""``beginning.begin_reference`` as one launch, of one program a row."""

import torch
import triton
import triton.language as tl


def begin(token, position, real, embedding, weight, frequencies, scaling, seen, next_slot):
    """``Beginning.step`` on the device of its tensors."""
    (L, B, H), E, half = next_slot.shape, embedding.shape[1], len(frequencies)
    assert next_slot.stride()[1:] == (H, 1) and seen.stride(1) == 1 and embedding.stride(1) == 1
    x, y = (embedding.new_empty(B, E) for _ in range(2))
    squares = torch.empty(B, 1, dtype=torch.float32, device=x.device)
    cos, sin = (x.new_empty(B, 2 * half) for _ in range(2))
    slot, now = next_slot.new_empty(L, B, H), seen.new_empty(B)
    with torch.cuda.device_of(x):
        _begin_kernel[(B,)](
            *(token, position, real, embedding, weight, frequencies, seen, next_slot),
            *(x, y, squares, cos, sin, slot, now),
            *(token.stride(0), position.stride(0), real.stride(0), embedding.stride(0)),
            *(seen.stride(0), next_slot.stride(0), scaling, B, E, L, H, half),
            BE=triton.next_power_of_2(E),
            BL=triton.next_power_of_2(L),
            BS=triton.next_power_of_2(L * H),
            BD=triton.next_power_of_2(half),
            num_warps=8,
        )
    return x, y, squares, cos, sin, slot, now


@triton.jit
def _begin_kernel(
    token, position, real, embedding, weight, frequencies, seen, next_slot,
    x, y, squares, cos, sin, slot, now,
    token_b, position_b, real_b, embedding_v, seen_l, next_l, scaling, B, E, L, H, half,
    BE: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    writes = tl.load(real + b * real_b) != 0
    at = tl.load(position + b * position_b).to(tl.float32)
    first = tl.load(seen + b)
    layer = tl.arange(0, BL)
    counts = tl.load(seen + layer * seen_l + b, mask=layer < L, other=0)
    tl.debug_barrier()  # every thread has read what some are about to change
    tl.store(seen + layer * seen_l + b, counts + writes.to(counts.dtype), mask=layer < L)
    tl.store(now + b, first)

    i = tl.arange(0, BS)
    place = tl.load(next_slot + i // H * next_l + b * H + i % H, mask=i < L * H, other=0)
    tl.store(slot + (i // H * B + b) * H + i % H, tl.where(writes, place, -1), mask=i < L * H)

    d = tl.arange(0, BD)
    angle = at * tl.load(frequencies + d, mask=d < half, other=0.0)
    c, s = (tl.cos(angle) * scaling).to(cos.dtype.element_ty), (tl.sin(angle) * scaling).to(sin.dtype.element_ty)
    for part in tl.static_range(2):  # the second half of a head turns like the first
        tl.store(cos + (2 * b + part) * half + d, c, mask=d < half)
        tl.store(sin + (2 * b + part) * half + d, s, mask=d < half)

    e = tl.arange(0, BE)
    row = tl.load(token + b * token_b).to(tl.int64)
    new = tl.load(embedding + row * embedding_v + e, mask=e < E, other=0.0)
    wide = new.to(tl.float32)
    factor = tl.load(weight + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(x + b * E + e, new, mask=e < E)
    tl.store(y + b * E + e, (wide * factor).to(y.dtype.element_ty), mask=e < E)
    tl.store(squares + b, tl.sum(wide * wide, 0))
