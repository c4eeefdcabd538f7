"""Soft eviction as fused kernels: nothing of size T x T ever reaches memory. See soft_eviction.py for what it computes.

Forward finds the border of every query of every KV head by halving, then attends as decay_triton.py does, with the
bias made on the fly from one number per key (worth) and one per query (border). Backward has its two kernels without
atomics, hence deterministic, and a light third one: what the borders received goes to the keys near them.

A query that sees all its keys has a border of inf: its bias, and all that would flow back through it, are then exactly
zero. The border kernel adds the same fp32 numbers as the torch path (log of an age from a table), so that both find the
same border; the others compute that log.

Names in kernels as in decay_triton.py, and: worth log(-log beta), sharpness log2(e) / temperature, z the bias's
argument in base 2, e = 2 ** -|z|.
"""

import torch
import triton
import triton.language as tl

from .. import device
from . import decay_triton
from .decay_triton import EXACT, LOG2E, NOTHING, _key_ranges, _load, _store
from .soft_eviction import HALVINGS, HIGHEST, LOWEST, YOUNGEST

LN2 = tl.constexpr(0.6931471805599453)
AGE_0 = tl.constexpr(YOUNGEST)
LOW, HIGH = tl.constexpr(LOWEST), tl.constexpr(HIGHEST)
CONFIGS = {  # as decay_triton.CONFIGS, with less per thread: those would spill here. By compiling for sm_90, not timed.
    "forward": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
    "keys": {64: (32, 128, 8, 3), 128: (32, 128, 8, 3), 256: (32, 64, 8, 2)},
    "queries": {64: (64, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
}
# Plain numbers per pair, no products of matrices: small blocks, many programs. Not timed.
BORDER = dict(BM=16, BN=128, num_warps=4)
BORDER_GRADIENT = dict(BM=128, BN=32, num_warps=4)


def unsupported(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the kernels cannot do this, or None."""
    return decay_triton.unsupported(q, v, "additive")


def attend(q, k, v, worth, log_ages, scaling, budget, temperature, start=None) -> torch.Tensor:
    """``soft_eviction.soft_eviction_attention`` on the device of q; worth and log_ages as the torch path makes them."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    sharpness = LOG2E.value / temperature
    if isinstance(sharpness, torch.Tensor):
        sharpness = sharpness.detach().to(q.device, torch.float32).reshape(1)
    else:
        sharpness = torch.full((1,), sharpness, dtype=torch.float32, device=q.device)
    return _Fused.apply(q, k, v, worth.float(), log_ages.float(), scaling, budget.float(), sharpness, start)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, worth, log_ages, scaling, budget, sharpness, start):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        worth, budget = worth.contiguous(), budget.contiguous()
        start = None if start is None else start.contiguous()
        (B, Q, T, _), H = q.shape, k.shape[1]
        border, share = torch.empty_like(worth), torch.empty_like(worth)
        out = torch.empty_like(q)
        lse = torch.empty(B, Q, T, dtype=torch.float32, device=q.device)
        config = _config("forward", q)
        with torch.cuda.device_of(q):
            _border_kernel[(B * H, triton.cdiv(T, BORDER["BM"]))](
                *(worth, log_ages, start, budget, sharpness, border, share, H, T),
                STEPS=HALVINGS,
                HAS_START=start is not None,
                **BORDER,
            )
            _forward_kernel[(B * Q, triton.cdiv(T, config["BM"]))](
                *(q, k, v, worth, border, start, sharpness, out, lse),
                *decay_triton._strides(q, k, v, out),
                **_options(q, k, scaling, start),
                **config,
            )
        ctx.save_for_backward(q, k, v, worth, log_ages, sharpness, start, border, share, out, lse)
        ctx.scaling = scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, worth, log_ages, sharpness, start, border, share, out, lse = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        (B, Q, T, D), H = q.shape, k.shape[1]
        options = _options(q, k, ctx.scaling, start)
        dq, dk, dv, dworth = (torch.empty_like(x) for x in (q, k, v, worth))
        delta, dborder = torch.empty_like(lse), torch.empty_like(lse)
        with torch.cuda.device_of(q):
            rows = max(1, 4096 // options["BD"])
            decay_triton._delta_kernel[(B * Q, triton.cdiv(T, rows))](
                *(out, dout, delta, *decay_triton._strides(out, dout), Q, T),
                **dict(D=D, BD=options["BD"], BM=rows, num_warps=4),
            )
            config = _config("keys", q)
            _keys_kernel[(B * H, triton.cdiv(T, config["BN"]))](
                *(q, k, v, worth, border, start, _ends(start, config), sharpness, dout, lse, delta, dk, dv, dworth),
                *decay_triton._strides(q, k, v, dout, dk, dv),
                **options,
                **config,
            )
            config = _config("queries", q)
            _queries_kernel[(B * Q, triton.cdiv(T, config["BM"]))](
                *(q, k, v, worth, border, start, sharpness, dout, lse, delta, dq, dborder),
                *decay_triton._strides(q, k, v, dout, dq),
                **options,
                **config,
            )
            if ctx.needs_input_grad[3]:
                share = dborder.view(B, H, Q // H, T).sum(2) * share
                at_fixed_borders, dworth = dworth, torch.empty_like(dworth)
                config = BORDER_GRADIENT
                _border_gradient_kernel[(B * H, triton.cdiv(T, config["BN"]))](
                    *(worth, log_ages, start, _ends(start, config), sharpness, border, share),
                    *(at_fixed_borders, dworth, H, T),
                    HAS_START=start is not None,
                    **config,
                )
        return dq, dk, dv, dworth, None, None, None, None, None


def _config(kernel: str, q: torch.Tensor) -> dict:
    config = decay_triton._config(kernel, q)
    if q.dtype == torch.float32 or not device.much_shared_memory(q):
        return config
    D = q.shape[-1]
    return dict(zip(config, CONFIGS[kernel][64 if D <= 64 else 128 if D <= 128 else 256], strict=True))


def _options(q, k, scaling, start) -> dict:
    T, D = q.shape[2:]
    return dict(
        H=k.shape[1],
        T=T,
        scaling=scaling,
        G=q.shape[1] // k.shape[1],
        D=D,
        BD=max(16, triton.next_power_of_2(D)),
        HAS_START=start is not None,
        RAGGED=T % 128 != 0,  # the last block of queries or keys is not full
    )


def _ends(start, config):
    return None if start is None else decay_triton._last_readers(start, config["BN"])


@triton.jit
def _worn(worth, log_ages, i, j, seen, T):
    """u [queries, keys] from the table; inf where the key is not seen."""
    ages = tl.load(log_ages + (i[:, None] - j[None, :]), mask=seen, other=float("inf"))
    return tl.load(worth + j, mask=j < T, other=0.0)[None, :] + ages


@triton.jit
def _slope(z):
    """The derivative of sigmoid, at an argument in base 2."""
    e = tl.exp2(-tl.abs(z))
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _border_kernel(
    worth, log_ages, start, budget, sharpness_ptr, border, share, H, T,
    STEPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """Each query's border, and 1 / the sum of its keys' slopes there; inf and 0 for a query that sees all its keys."""
    n = tl.program_id(0).to(tl.int64)
    i0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM  # the longest blocks first
    i = i0 + tl.arange(0, BM)
    worth += n * T
    first = tl.zeros([BM], tl.int32)
    lo = 0
    if HAS_START:
        start += n // H * T
        first = tl.load(start + i, mask=i < T, other=0).to(tl.int32)
        lo = tl.load(start + i0).to(tl.int32) // BN * BN
    num = tl.load(budget + n // H)
    sharpness = tl.load(sharpness_ptr)
    crowded = (i < T) & ((i - first + 1).to(tl.float32) > num)
    any_crowded = tl.max(crowded.to(tl.int32), 0)
    hi = tl.where(any_crowded > 0, tl.minimum(i0 + BM, T), lo)
    low = tl.full([BM], LOW, tl.float32)
    high = tl.full([BM], HIGH, tl.float32)
    for _step in range(STEPS):
        middle = (low + high) * 0.5
        below = tl.zeros([BM, BN], tl.int32)
        for j0 in range(lo, hi, BN):
            j = j0 + tl.arange(0, BN)
            seen = (j[None, :] <= i[:, None]) & (j[None, :] >= first[:, None]) & (i < T)[:, None]
            below += (_worn(worth, log_ages, i, j, seen, T) < middle[:, None]).to(tl.int32)
        enough = tl.sum(below, 1).to(tl.float32) >= num
        low = tl.where(enough, low, middle)
        high = tl.where(enough, middle, high)
    last_in = tl.full([BM], LOW, tl.float32)
    first_out = tl.full([BM], float("inf"), tl.float32)
    for j0 in range(lo, hi, BN):
        j = j0 + tl.arange(0, BN)
        seen = (j[None, :] <= i[:, None]) & (j[None, :] >= first[:, None]) & (i < T)[:, None]
        u = _worn(worth, log_ages, i, j, seen, T)
        last_in = tl.maximum(last_in, tl.max(tl.where(u < high[:, None], u, LOW), 1))
        first_out = tl.minimum(first_out, tl.min(tl.where(u < high[:, None], float("inf"), u), 1))
    c = tl.where(first_out == float("inf"), high, (last_in + first_out) * 0.5)
    total = tl.zeros([BM], tl.float32)
    for j0 in range(lo, hi, BN):
        j = j0 + tl.arange(0, BN)
        seen = (j[None, :] <= i[:, None]) & (j[None, :] >= first[:, None]) & (i < T)[:, None]
        total += tl.sum(_slope((c[:, None] - _worn(worth, log_ages, i, j, seen, T)) * sharpness), 1)
    tl.store(border + n * T + i, tl.where(crowded, c, float("inf")), mask=i < T)
    tl.store(share + n * T + i, tl.where(crowded, 1.0 / tl.maximum(total, 1e-6), 0.0), mask=i < T)


@triton.jit
def _border_gradient_kernel(
    worth, log_ages, start, ends, sharpness_ptr, border, share, at_fixed_borders, dworth, H, T,
    BM: tl.constexpr, BN: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """Adds the borders' gradients (``share``: already divided by the sum of slopes) to those of a block of keys."""
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    j = block * BN + tl.arange(0, BN)
    worth += n * T
    border += n * T
    share += n * T
    sharpness = tl.load(sharpness_ptr)
    end = T
    if HAS_START:
        start += n // H * T
        end = tl.load(ends + (n // H * tl.num_programs(1) + block) * 2 + 1)
    acc = tl.zeros([BN], tl.float32)
    for i0 in range(block * BN, end, BM):
        i = i0 + tl.arange(0, BM)
        seen = (j[None, :] <= i[:, None]) & (i < T)[:, None]
        if HAS_START:
            first = tl.load(start + i, mask=i < T, other=0).to(tl.int32)
            seen = seen & (j[None, :] >= first[:, None])
        c = tl.load(border + i, mask=i < T, other=float("inf"))
        given = tl.load(share + i, mask=i < T, other=0.0)
        # Not c - u: inf - inf where the border is inf and the key not seen.
        u = tl.where(seen, _worn(worth, log_ages, i, j, seen, T), 0.0)
        slope = tl.where(seen, _slope((c[:, None] - u) * sharpness), 0.0)
        acc += tl.sum(slope * given[:, None], 0)
    acc += tl.load(at_fixed_borders + n * T + j, mask=j < T, other=0.0)
    tl.store(dworth + n * T + j, acc, mask=j < T)


@triton.jit
def _cut(worth, border, i, j, sharpness, MASKED: tl.constexpr, KEYS: tl.constexpr):
    """z and e of every pair; KEYS: axis of the keys."""
    if KEYS == 1:
        age = (i[:, None] - j[None, :]).to(tl.float32)
        gap = border[:, None] - worth[None, :]
    else:
        age = (i[None, :] - j[:, None]).to(tl.float32)
        gap = border[None, :] - worth[:, None]
    if MASKED:  # elsewhere all keys are older than all queries
        age = tl.maximum(age, AGE_0)
    z = (gap - tl.log2(age) * LN2) * sharpness
    return z, tl.exp2(-tl.abs(z))


@triton.jit
def _logits(dot, z, e, i, j, scaling, first, MASKED: tl.constexpr, KEYS: tl.constexpr):
    """Base-2 logits from q . k."""
    x = dot * (scaling * LOG2E) + tl.minimum(z, 0.0) - tl.log2(1.0 + e)
    if MASKED:
        if KEYS == 1:
            x = tl.where((j[None, :] <= i[:, None]) & (j[None, :] >= first[:, None]), x, float("-inf"))
        else:
            x = tl.where((j[:, None] <= i[None, :]) & (j[:, None] >= first[None, :]), x, float("-inf"))
    return x


@triton.jit
def _forward_part(
    acc, total, top, q, k, v, worth_ptr, k_t, v_t, border, sharpness, i, first, lo, hi, T, scaling,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    for j0 in range(lo, hi, BN):
        j = j0 + tl.arange(0, BN)
        keys = _load(k, j, k_t, T, D, BD, RAGGED)
        worth = tl.load(worth_ptr + j, mask=j < T, other=0.0) if RAGGED else tl.load(worth_ptr + j)
        dot = tl.dot(q, tl.trans(keys), input_precision=EXACT)
        z, e = _cut(worth, border, i, j, sharpness, MASKED, 1)
        x = _logits(dot, z, e, i, j, scaling, first, MASKED, 1)
        new_top = tl.maximum(top, tl.max(x, 1))
        weights = tl.exp2(x - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        values = _load(v, j, v_t, T, D, BD, RAGGED)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=EXACT)
        top = new_top
    return acc, total, top


@triton.jit
def _forward_kernel(
    q, k, v, worth, border, start, sharpness_ptr, out, lse,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t,
    H, T, scaling,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_START: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64) // (H * G), tl.program_id(0).to(tl.int64) % (H * G)
    i0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    i = i0 + tl.arange(0, BM)
    k += row * k_b + head // G * k_h
    v += row * v_b + head // G * v_h
    worth += (row * H + head // G) * T
    c = tl.load(border + (row * H + head // G) * T + i, mask=i < T, other=float("inf"))
    sharpness = tl.load(sharpness_ptr)
    first = tl.zeros([BM], tl.int32)
    if HAS_START:
        start += row * T
        first = tl.load(start + i, mask=i < T, other=0).to(tl.int32)
    queries = _load(q + row * q_b + head * q_h, i, q_t, T, D, BD, RAGGED)
    acc = tl.zeros([BM, BD], tl.float32)
    top = tl.zeros([BM], tl.float32) + NOTHING
    total = tl.zeros([BM], tl.float32)
    lo, full, near, hi = _key_ranges(start, i0, T, BM, BN, HAS_START)
    if HAS_START:
        acc, total, top = _forward_part(
            acc, total, top, queries, k, v, worth, k_t, v_t, c, sharpness, i, first, lo, full, T, scaling,
            D, BD, BN, True, False,
        )  # fmt: skip
    acc, total, top = _forward_part(
        acc, total, top, queries, k, v, worth, k_t, v_t, c, sharpness, i, first, tl.maximum(lo, full), near, T, scaling,
        D, BD, BN, False, False,
    )  # fmt: skip
    acc, total, top = _forward_part(
        acc, total, top, queries, k, v, worth, k_t, v_t, c, sharpness, i, first, tl.maximum(lo, near), hi, T, scaling,
        D, BD, BN, True, RAGGED,
    )  # fmt: skip
    _store(out + row * out_b + head * out_h, i, out_t, T, acc / total[:, None], D, BD)
    tl.store(lse + (row * H * G + head) * T + i, top + tl.log2(total), mask=i < T)


@triton.jit
def _keys_part(
    dk, dv, dworth, keys, values, worth, sharpness, q, dout, lse, delta, border, start, q_t, do_t, j, lo, hi, T,
    scaling, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    HAS_START: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    for i0 in range(lo, hi, BM):
        i = i0 + tl.arange(0, BM)
        queries = _load(q, i, q_t, T, D, BD, RAGGED)
        # A query beyond the end has a log-sum of inf, hence no weight anywhere.
        norm = tl.load(lse + i, mask=i < T, other=float("inf")) if RAGGED else tl.load(lse + i)
        c = tl.load(border + i, mask=i < T, other=float("inf")) if RAGGED else tl.load(border + i)
        if HAS_START and MASKED:
            first = tl.load(start + i, mask=i < T, other=0).to(tl.int32)
        else:
            first = tl.zeros([BM], tl.int32)
        dot = tl.dot(keys, tl.trans(queries), input_precision=EXACT)
        z, e = _cut(worth, c, i, j, sharpness, MASKED, 0)
        weights = tl.exp2(_logits(dot, z, e, i, j, scaling, first, MASKED, 0) - norm[None, :])
        do = _load(dout, i, do_t, T, D, BD, RAGGED)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=EXACT)
        dweights = tl.dot(values, tl.trans(do), input_precision=EXACT)
        dot_out = tl.load(delta + i, mask=i < T, other=0.0) if RAGGED else tl.load(delta + i)
        dx = weights * (dweights - dot_out[None, :])
        dworth -= tl.sum(dx * tl.where(z > 0, e, 1.0) / (1.0 + e), 1)
        dk = tl.dot(dx.to(queries.dtype), queries, dk, input_precision=EXACT)
    return dk, dv, dworth


@triton.jit
def _keys_kernel(
    q, k, v, worth_ptr, border, start, ends, sharpness_ptr, dout, lse, delta, dk_ptr, dv_ptr, dworth_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    H, T, scaling,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_START: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """dk, dv and, at fixed borders, dworth of a block of keys: the first blocks have most readers, and come first."""
    row, head = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    block = tl.program_id(1)
    j = block * BN + tl.arange(0, BN)
    keys = _load(k + row * k_b + head * k_h, j, k_t, T, D, BD, RAGGED)
    values = _load(v + row * v_b + head * v_h, j, v_t, T, D, BD, RAGGED)
    worth = tl.load(worth_ptr + (row * H + head) * T + j, mask=j < T, other=0.0)
    border += (row * H + head) * T
    sharpness = tl.load(sharpness_ptr)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    dworth = tl.zeros([BN], tl.float32)
    # Queries [lo, far) lie on the diagonal, [far, full) see every key, [full, end) some: those need a mask again.
    lo = block * BN // BM * BM
    far = (block * BN + BN + BM - 1) // BM * BM
    full = T
    end = T
    if HAS_START:
        start += row * T
        ends += (row * tl.num_programs(1) + block) * 2
        full = tl.maximum(tl.load(ends) // BM * BM, far)
        end = tl.load(ends + 1)
    for member in range(G):
        q_head = head * G + member
        q_at = q + row * q_b + q_head * q_h
        do_at = dout + row * do_b + q_head * do_h
        lse_at = lse + (row * H * G + q_head) * T
        delta_at = delta + (row * H * G + q_head) * T
        dk, dv, dworth = _keys_part(
            dk, dv, dworth, keys, values, worth, sharpness, q_at, do_at, lse_at, delta_at, border, start, q_t, do_t, j,
            lo, tl.minimum(far, end), T, scaling, D, BD, BM, HAS_START, True, RAGGED,
        )  # fmt: skip
        dk, dv, dworth = _keys_part(
            dk, dv, dworth, keys, values, worth, sharpness, q_at, do_at, lse_at, delta_at, border, start, q_t, do_t, j,
            far, tl.minimum(full, end), T, scaling, D, BD, BM, HAS_START, False, RAGGED,
        )  # fmt: skip
        if HAS_START:
            dk, dv, dworth = _keys_part(
                dk, dv, dworth, keys, values, worth, sharpness, q_at, do_at, lse_at, delta_at, border, start, q_t, do_t,
                j, full, end, T, scaling, D, BD, BM, HAS_START, True, RAGGED,
            )  # fmt: skip
    _store(dk_ptr + row * dk_b + head * dk_h, j, dk_t, T, dk * scaling, D, BD)
    _store(dv_ptr + row * dv_b + head * dv_h, j, dv_t, T, dv, D, BD)
    tl.store(dworth_ptr + (row * H + head) * T + j, dworth * (sharpness * LN2), mask=j < T)


@triton.jit
def _queries_part(
    dq, dborder, queries, do, norm, dot_out, k, v, worth_ptr, k_t, v_t, border, sharpness, i, first, lo, hi, T, scaling,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    for j0 in range(lo, hi, BN):
        j = j0 + tl.arange(0, BN)
        keys = _load(k, j, k_t, T, D, BD, RAGGED)
        values = _load(v, j, v_t, T, D, BD, RAGGED)
        worth = tl.load(worth_ptr + j, mask=j < T, other=0.0) if RAGGED else tl.load(worth_ptr + j)
        dot = tl.dot(queries, tl.trans(keys), input_precision=EXACT)
        z, e = _cut(worth, border, i, j, sharpness, MASKED, 1)
        weights = tl.exp2(_logits(dot, z, e, i, j, scaling, first, MASKED, 1) - norm[:, None])
        dweights = tl.dot(do, tl.trans(values), input_precision=EXACT)
        dx = weights * (dweights - dot_out[:, None])
        dborder += tl.sum(dx * tl.where(z > 0, e, 1.0) / (1.0 + e), 1)
        dq = tl.dot(dx.to(keys.dtype), keys, dq, input_precision=EXACT)
    return dq, dborder


@triton.jit
def _queries_kernel(
    q, k, v, worth, border, start, sharpness_ptr, dout, lse, delta, dq_ptr, dborder_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dq_b, dq_h, dq_t,
    H, T, scaling,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_START: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """dq, and what this query head gives to its border; the borders' gradient is the sum over the group."""
    row, head = tl.program_id(0).to(tl.int64) // (H * G), tl.program_id(0).to(tl.int64) % (H * G)
    i0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    i = i0 + tl.arange(0, BM)
    k += row * k_b + head // G * k_h
    v += row * v_b + head // G * v_h
    worth += (row * H + head // G) * T
    c = tl.load(border + (row * H + head // G) * T + i, mask=i < T, other=float("inf"))
    sharpness = tl.load(sharpness_ptr)
    first = tl.zeros([BM], tl.int32)
    if HAS_START:
        start += row * T
        first = tl.load(start + i, mask=i < T, other=0).to(tl.int32)
    queries = _load(q + row * q_b + head * q_h, i, q_t, T, D, BD, RAGGED)
    do = _load(dout + row * do_b + head * do_h, i, do_t, T, D, BD, RAGGED)
    norm = tl.load(lse + (row * H * G + head) * T + i, mask=i < T, other=float("inf"))
    dot_out = tl.load(delta + (row * H * G + head) * T + i, mask=i < T, other=0.0)
    dq = tl.zeros([BM, BD], tl.float32)
    dborder = tl.zeros([BM], tl.float32)
    lo, full, near, hi = _key_ranges(start, i0, T, BM, BN, HAS_START)
    if HAS_START:
        dq, dborder = _queries_part(
            dq, dborder, queries, do, norm, dot_out, k, v, worth, k_t, v_t, c, sharpness, i, first, lo, full, T,
            scaling, D, BD, BN, True, False,
        )  # fmt: skip
    dq, dborder = _queries_part(
        dq, dborder, queries, do, norm, dot_out, k, v, worth, k_t, v_t, c, sharpness, i, first, tl.maximum(lo, full),
        near, T, scaling, D, BD, BN, False, False,
    )  # fmt: skip
    dq, dborder = _queries_part(
        dq, dborder, queries, do, norm, dot_out, k, v, worth, k_t, v_t, c, sharpness, i, first, tl.maximum(lo, near),
        hi, T, scaling, D, BD, BN, True, RAGGED,
    )  # fmt: skip
    _store(dq_ptr + row * dq_b + head * dq_h, i, dq_t, T, dq * scaling, D, BD)
    at = dborder_ptr + (row * H * G + head) * T + i
    tl.store(at, dborder * (sharpness * LN2), mask=i < T)
