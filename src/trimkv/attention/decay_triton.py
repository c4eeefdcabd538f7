"""Decayed attention as fused kernels: nothing of size T x T ever reaches memory. See decay.py for what it computes.

Forward keeps a running softmax (out and one log-sum per query). Backward makes the weights again from that log-sum, in
two kernels without atomics, hence deterministic: one owns a block of keys and walks over the younger queries of all G
query heads (dk, dv, dlog_beta), one owns a block of queries and walks over the older keys (dq).

All logits are in fp32 and in base 2. A block of keys that is older than all queries of a block needs no mask, and there
the decay splits into  (i - i0) * log_beta_j + (i0 - j) * log_beta_j,  terms of one sign: no age per pair is needed and
nothing cancels. On the diagonal the age is taken exactly.

Names in kernels: BM queries from i0, BN keys in a block; BD the head dim as a power of two; i and
j the indices of queries and keys; lb log2(beta); x logits.
"""

import torch
import triton
import triton.language as tl

from .. import device

LOG2E = tl.constexpr(1.4426950408889634)
# fp32 as three tf32 products on tensor cores: fp32's precision, several times its speed. bf16 and fp16 don't care.
EXACT = tl.constexpr("tf32x3")
# Where a running maximum starts: finite, so that a block without a visible key gives exp2(-inf - it) = 0, not NaN.
NOTHING = tl.constexpr(-1e30)


def unsupported(q: torch.Tensor, v: torch.Tensor, variant: str) -> str | None:
    """Why the kernels cannot do this, or None."""
    if variant != "additive":
        return f"the Triton kernels do not know variant={variant!r}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels take fp32, bf16 and fp16, not {q.dtype}"
    if q.shape[-1] > 256 or v.shape[-1] != q.shape[-1]:
        return f"the Triton kernels need one head dim of at most 256, not {q.shape[-1]} and {v.shape[-1]}"
    if not device.runs_kernels(q):
        return "the Triton kernels need CUDA tensors (or TRITON_INTERPRET=1)"
    return None


def attend(q, k, v, log_beta, scaling, start=None, softcap=None, s_aux=None) -> torch.Tensor:
    """``decay.decayed_attention`` on the device of q."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    return _Fused.apply(q, k, v, log_beta.float(), s_aux, start, scaling, softcap)


def _config(kernel: str, q: torch.Tensor) -> dict:
    """Block sizes by hand: an autotuner's minutes at every start cost more than it finds."""
    D = q.shape[-1]
    size = 64 if D <= 64 else 128 if D <= 128 else 256
    table = CONFIGS
    if q.dtype == torch.float32:
        table = FP32_CONFIGS
    elif not device.much_shared_memory(q):
        table = SMALL_CONFIGS
    BM, BN, num_warps, num_stages = table[kernel][size]
    return dict(BM=BM, BN=BN, num_warps=num_warps, num_stages=num_stages)


CONFIGS = {  # head dim up to: (BM, BN, warps, stages), timed on an H100
    "forward": {64: (128, 64, 4, 3), 128: (128, 128, 8, 3), 256: (128, 64, 8, 2)},
    "keys": {64: (64, 128, 8, 3), 128: (32, 128, 8, 3), 256: (32, 64, 8, 2)},
    "queries": {64: (128, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 4, 2)},
}
SMALL_CONFIGS = {  # for 99 KB of shared memory, not timed
    "forward": {64: (128, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)},
    "keys": {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (16, 32, 4, 1)},
    "queries": {64: (128, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 1)},
}
FP32_CONFIGS = {  # small: fp32 tiles take twice the registers; "keys" and D 256 still spill some
    "forward": {64: (32, 32, 4, 2), 128: (32, 32, 4, 1), 256: (16, 32, 4, 1)},
    "keys": {64: (32, 32, 4, 2), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
    "queries": {64: (32, 32, 4, 2), 128: (32, 32, 4, 1), 256: (16, 32, 4, 1)},
}


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_beta, s_aux, start, scaling, softcap):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        log_beta = log_beta.contiguous()
        start = None if start is None else start.contiguous()
        B, Q, T, D = q.shape
        out = torch.empty_like(q)
        lse = torch.empty(B, Q, T, dtype=torch.float32, device=q.device)
        options = _options(q, k, scaling, softcap, start)
        config = _config("forward", q)
        with torch.cuda.device_of(q):
            _forward_kernel[(B * Q, triton.cdiv(T, config["BM"]))](
                *(q, k, v, log_beta, start, None if s_aux is None else s_aux.float(), out, lse),
                *_strides(q, k, v, out),
                HAS_AUX=s_aux is not None,
                **options,
                **config,
            )
        ctx.save_for_backward(q, k, v, log_beta, s_aux, start, out, lse)
        ctx.scaling, ctx.softcap = scaling, softcap
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, log_beta, s_aux, start, out, lse = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        (B, Q, T, D), H = q.shape, k.shape[1]
        options = _options(q, k, ctx.scaling, ctx.softcap, start)
        dq, dk, dv, dlog_beta = (torch.empty_like(x) for x in (q, k, v, log_beta))
        delta = torch.empty_like(lse)
        with torch.cuda.device_of(q):
            rows = max(1, 4096 // options["BD"])
            _delta_kernel[(B * Q, triton.cdiv(T, rows))](
                out, dout, delta, *_strides(out, dout), Q, T, D=D, BD=options["BD"], BM=rows, num_warps=4
            )
            config = _config("keys", q)
            ends = None if start is None else _last_readers(start, config["BN"])
            _keys_kernel[(B * H, triton.cdiv(T, config["BN"]))](
                *(q, k, v, log_beta, start, ends, dout, lse, delta, dk, dv, dlog_beta),
                *_strides(q, k, v, dout, dk, dv),
                **options,
                **config,
            )
            if ctx.needs_input_grad[0]:
                config = _config("queries", q)
                _queries_kernel[(B * Q, triton.cdiv(T, config["BM"]))](
                    *(q, k, v, log_beta, start, dout, lse, delta, dq),
                    *_strides(q, k, v, dout, dq),
                    **options,
                    **config,
                )
        daux = None
        if s_aux is not None and ctx.needs_input_grad[4]:
            taken = torch.exp(s_aux.float()[:, None] - lse * 0.6931471805599453)
            daux = -(taken * delta).sum((0, 2)).to(s_aux.dtype)
        return dq, dk, dv, dlog_beta, daux, None, None, None


def _options(q, k, scaling, softcap, start) -> dict:
    T, D = q.shape[2:]
    return dict(
        H=k.shape[1],
        T=T,
        scaling=scaling,
        softcap=softcap or 0.0,
        G=q.shape[1] // k.shape[1],
        D=D,
        BD=max(16, triton.next_power_of_2(D)),
        HAS_START=start is not None,
        HAS_CAP=softcap is not None,
        RAGGED=T % 128 != 0,  # the last block of queries or keys is not full
    )


def _strides(*tensors):
    """Of B, heads and T; the last dimension is dense."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _last_readers(start: torch.Tensor, BN: int) -> torch.Tensor:
    """For every block of BN keys, how far its readers go: [B, blocks, 2], int32.

    Queries before the first number see every key of the block (that is not younger), queries from the second on see
    none. A binary search, because start does not decrease; computed on the device.
    """
    T = start.shape[1]
    first = torch.arange(0, T, BN, device=start.device, dtype=start.dtype).expand(start.shape[0], -1)
    keys = torch.stack([first, (first + BN - 1).clamp_max(T - 1)], -1)
    return torch.searchsorted(start, keys.flatten(1), right=True).view(keys.shape).int()


@triton.jit
def _load(ptr, rows, stride, T, D: tl.constexpr, BD: tl.constexpr, RAGGED: tl.constexpr):
    """Rows of a [T, D] matrix as [rows, BD], zeros outside."""
    column = tl.arange(0, BD)
    at = ptr + rows[:, None] * stride + column[None, :]
    if RAGGED:
        return tl.load(at, mask=(rows[:, None] < T) & (column[None, :] < D), other=0.0)
    elif D != BD:
        return tl.load(at, mask=column[None, :] < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store(ptr, rows, stride, T, x, D: tl.constexpr, BD: tl.constexpr):
    column = tl.arange(0, BD)
    at = ptr + rows[:, None] * stride + column[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(rows[:, None] < T) & (column[None, :] < D))


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2E)) + 1.0)


@triton.jit
def _scaled(dot, scaling, softcap, HAS_CAP: tl.constexpr):
    """Base-2 logits from q . k."""
    if HAS_CAP:
        x = _tanh(dot * (scaling / softcap)) * (softcap * LOG2E)
    else:
        x = dot * (scaling * LOG2E)
    return x


@triton.jit
def _no_key_yet(s_aux, head, BM: tl.constexpr, HAS_AUX: tl.constexpr):
    """The largest logit and the sum that a running softmax begins with: those of the sink, where there is one."""
    if HAS_AUX:
        top = tl.zeros([BM], tl.float32) + tl.load(s_aux + head) * LOG2E
        total = tl.zeros([BM], tl.float32) + 1.0
    else:
        top = tl.zeros([BM], tl.float32) + NOTHING
        total = tl.zeros([BM], tl.float32)
    return top, total


@triton.jit
def _key_ranges(start, i0, T, BM: tl.constexpr, BN: tl.constexpr, HAS_START: tl.constexpr):
    """Blocks of keys for queries from i0: [lo, full) needs start, [full, near) no mask, [near, i0 + BM) both masks."""
    near = i0 // BN * BN
    lo = 0
    full = 0
    if HAS_START:
        lo = tl.load(start + i0).to(tl.int32) // BN * BN
        full = tl.load(start + tl.minimum(i0 + BM, T) - 1).to(tl.int32)
        full = tl.minimum((full + BN - 1) // BN * BN, near)
    return lo, full, near, tl.minimum(i0 + BM, T)


@triton.jit
def _logits(
    dot, lb, i, j, i0, scaling, softcap, first, MASKED: tl.constexpr, HAS_CAP: tl.constexpr, KEYS: tl.constexpr
):
    """Base-2 logits from q . k, and tanh where there is a softcap. i, lb and j broadcast; KEYS: axis of the keys."""
    capped = dot
    if HAS_CAP:
        capped = _tanh(dot * (scaling / softcap))
        x = capped * (softcap * LOG2E)
    else:
        x = dot * (scaling * LOG2E)
    if KEYS == 1:
        if MASKED:
            x += (i[:, None] - j[None, :]).to(tl.float32) * lb[None, :]
            x = tl.where((j[None, :] <= i[:, None]) & (j[None, :] >= first[:, None]), x, float("-inf"))
        else:
            x += (i - i0).to(tl.float32)[:, None] * lb[None, :] + ((i0 - j).to(tl.float32) * lb)[None, :]
    else:
        if MASKED:
            x += (i[None, :] - j[:, None]).to(tl.float32) * lb[:, None]
            x = tl.where((j[:, None] <= i[None, :]) & (j[:, None] >= first[None, :]), x, float("-inf"))
        else:
            x += (i - i0).to(tl.float32)[None, :] * lb[:, None] + ((i0 - j).to(tl.float32) * lb)[:, None]
    return x, capped


@triton.jit
def _forward_part(
    acc, total, top, q, k, v, lb_ptr, k_t, v_t, i, i0, first, lo, hi, T, scaling, softcap,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    for j0 in range(lo, hi, BN):
        j = j0 + tl.arange(0, BN)
        keys = _load(k, j, k_t, T, D, BD, RAGGED)
        lb = (tl.load(lb_ptr + j, mask=j < T, other=0.0) if RAGGED else tl.load(lb_ptr + j)) * LOG2E
        x = tl.dot(q, tl.trans(keys), input_precision=EXACT)
        x, _ = _logits(x, lb, i, j, i0, scaling, softcap, first, MASKED, HAS_CAP, 1)
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
    q, k, v, log_beta, start, s_aux, out, lse,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t,
    H, T, scaling, softcap,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_START: tl.constexpr, HAS_CAP: tl.constexpr, HAS_AUX: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64) // (H * G), tl.program_id(0).to(tl.int64) % (H * G)
    i0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM  # the longest blocks first
    i = i0 + tl.arange(0, BM)
    k += row * k_b + head // G * k_h
    v += row * v_b + head // G * v_h
    log_beta += (row * H + head // G) * T
    first = tl.zeros([BM], tl.int32)
    if HAS_START:
        start += row * T
        first = tl.load(start + i, mask=i < T, other=0).to(tl.int32)
    queries = _load(q + row * q_b + head * q_h, i, q_t, T, D, BD, RAGGED)
    acc = tl.zeros([BM, BD], tl.float32)
    top, total = _no_key_yet(s_aux, head, BM, HAS_AUX)
    lo, full, near, hi = _key_ranges(start, i0, T, BM, BN, HAS_START)
    if HAS_START:
        acc, total, top = _forward_part(
            acc, total, top, queries, k, v, log_beta, k_t, v_t, i, i0, first, lo, full, T, scaling, softcap,
            D, BD, BN, HAS_CAP, True, False,
        )  # fmt: skip
    acc, total, top = _forward_part(
        acc, total, top, queries, k, v, log_beta, k_t, v_t, i, i0, first, tl.maximum(lo, full), near, T, scaling,
        softcap, D, BD, BN, HAS_CAP, False, False,
    )  # fmt: skip
    acc, total, top = _forward_part(
        acc, total, top, queries, k, v, log_beta, k_t, v_t, i, i0, first, tl.maximum(lo, near), hi, T, scaling,
        softcap, D, BD, BN, HAS_CAP, True, RAGGED,
    )  # fmt: skip
    _store(out + row * out_b + head * out_h, i, out_t, T, acc / total[:, None], D, BD)
    tl.store(lse + (row * H * G + head) * T + i, top + tl.log2(total), mask=i < T)


@triton.jit
def _delta_kernel(
    out, dout, delta, out_b, out_h, out_t, do_b, do_h, do_t, Q, T, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr
):
    row, head = tl.program_id(0).to(tl.int64) // Q, tl.program_id(0).to(tl.int64) % Q
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    a = _load(out + row * out_b + head * out_h, i, out_t, T, D, BD, True).to(tl.float32)
    b = _load(dout + row * do_b + head * do_h, i, do_t, T, D, BD, True).to(tl.float32)
    tl.store(delta + (row * Q + head) * T + i, tl.sum(a * b, 1), mask=i < T)


@triton.jit
def _keys_part(
    dk, dv, dlb, keys, values, lb, q, dout, lse, delta, start, q_t, do_t, j, lo, hi, T, scaling, softcap,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    HAS_START: tl.constexpr, HAS_CAP: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    for i0 in range(lo, hi, BM):
        i = i0 + tl.arange(0, BM)
        queries = _load(q, i, q_t, T, D, BD, RAGGED)
        # A query beyond the end has a log-sum of inf, hence no weight anywhere.
        norm = tl.load(lse + i, mask=i < T, other=float("inf")) if RAGGED else tl.load(lse + i)
        if HAS_START and MASKED:
            first = tl.load(start + i, mask=i < T, other=0).to(tl.int32)
        else:
            first = tl.zeros([BM], tl.int32)
        x = tl.dot(keys, tl.trans(queries), input_precision=EXACT)
        x, capped = _logits(x, lb, i, j, i0, scaling, softcap, first, MASKED, HAS_CAP, 0)
        weights = tl.exp2(x - norm[None, :])
        do = _load(dout, i, do_t, T, D, BD, RAGGED)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=EXACT)
        dweights = tl.dot(values, tl.trans(do), input_precision=EXACT)
        dot_out = tl.load(delta + i, mask=i < T, other=0.0) if RAGGED else tl.load(delta + i)
        dx = weights * (dweights - dot_out[None, :])
        if MASKED:
            dlb += tl.sum(dx * (i[None, :] - j[:, None]).to(tl.float32), 1)
        else:
            dlb += tl.sum(dx * (i - i0).to(tl.float32)[None, :], 1) + (i0 - j).to(tl.float32) * tl.sum(dx, 1)
        if HAS_CAP:
            dx *= 1.0 - capped * capped
        dk = tl.dot(dx.to(queries.dtype), queries, dk, input_precision=EXACT)
    return dk, dv, dlb


@triton.jit
def _keys_kernel(
    q, k, v, log_beta, start, ends, dout, lse, delta, dk_ptr, dv_ptr, dlog_beta,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    H, T, scaling, softcap,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_START: tl.constexpr, HAS_CAP: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """dk, dv and dlog_beta of a block of keys: the first blocks have the most readers, and come first."""
    row, head = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    block = tl.program_id(1)
    j = block * BN + tl.arange(0, BN)
    keys = _load(k + row * k_b + head * k_h, j, k_t, T, D, BD, RAGGED)
    values = _load(v + row * v_b + head * v_h, j, v_t, T, D, BD, RAGGED)
    lb = tl.load(log_beta + (row * H + head) * T + j, mask=j < T, other=0.0) * LOG2E
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    dlb = tl.zeros([BN], tl.float32)
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
        dk, dv, dlb = _keys_part(
            dk, dv, dlb, keys, values, lb, q_at, do_at, lse_at, delta_at, start, q_t, do_t, j, lo,
            tl.minimum(far, end), T, scaling, softcap, D, BD, BM, HAS_START, HAS_CAP, True, RAGGED,
        )  # fmt: skip
        dk, dv, dlb = _keys_part(
            dk, dv, dlb, keys, values, lb, q_at, do_at, lse_at, delta_at, start, q_t, do_t, j, far,
            tl.minimum(full, end), T, scaling, softcap, D, BD, BM, HAS_START, HAS_CAP, False, RAGGED,
        )  # fmt: skip
        if HAS_START:
            dk, dv, dlb = _keys_part(
                dk, dv, dlb, keys, values, lb, q_at, do_at, lse_at, delta_at, start, q_t, do_t, j, full,
                end, T, scaling, softcap, D, BD, BM, HAS_START, HAS_CAP, True, RAGGED,
            )  # fmt: skip
    _store(dk_ptr + row * dk_b + head * dk_h, j, dk_t, T, dk * scaling, D, BD)
    _store(dv_ptr + row * dv_b + head * dv_h, j, dv_t, T, dv, D, BD)
    tl.store(dlog_beta + (row * H + head) * T + j, dlb, mask=j < T)


@triton.jit
def _queries_part(
    dq, queries, do, norm, dot_out, k, v, lb_ptr, k_t, v_t, i, i0, first, lo, hi, T, scaling, softcap,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    for j0 in range(lo, hi, BN):
        j = j0 + tl.arange(0, BN)
        keys = _load(k, j, k_t, T, D, BD, RAGGED)
        values = _load(v, j, v_t, T, D, BD, RAGGED)
        lb = (tl.load(lb_ptr + j, mask=j < T, other=0.0) if RAGGED else tl.load(lb_ptr + j)) * LOG2E
        x = tl.dot(queries, tl.trans(keys), input_precision=EXACT)
        x, capped = _logits(x, lb, i, j, i0, scaling, softcap, first, MASKED, HAS_CAP, 1)
        weights = tl.exp2(x - norm[:, None])
        dweights = tl.dot(do, tl.trans(values), input_precision=EXACT)
        dx = weights * (dweights - dot_out[:, None])
        if HAS_CAP:
            dx *= 1.0 - capped * capped
        dq = tl.dot(dx.to(keys.dtype), keys, dq, input_precision=EXACT)
    return dq


@triton.jit
def _queries_kernel(
    q, k, v, log_beta, start, dout, lse, delta, dq_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dq_b, dq_h, dq_t,
    H, T, scaling, softcap,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_START: tl.constexpr, HAS_CAP: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64) // (H * G), tl.program_id(0).to(tl.int64) % (H * G)
    i0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    i = i0 + tl.arange(0, BM)
    k += row * k_b + head // G * k_h
    v += row * v_b + head // G * v_h
    log_beta += (row * H + head // G) * T
    first = tl.zeros([BM], tl.int32)
    if HAS_START:
        start += row * T
        first = tl.load(start + i, mask=i < T, other=0).to(tl.int32)
    queries = _load(q + row * q_b + head * q_h, i, q_t, T, D, BD, RAGGED)
    do = _load(dout + row * do_b + head * do_h, i, do_t, T, D, BD, RAGGED)
    norm = tl.load(lse + (row * H * G + head) * T + i, mask=i < T, other=float("inf"))
    dot_out = tl.load(delta + (row * H * G + head) * T + i, mask=i < T, other=0.0)
    dq = tl.zeros([BM, BD], tl.float32)
    lo, full, near, hi = _key_ranges(start, i0, T, BM, BN, HAS_START)
    if HAS_START:
        dq = _queries_part(
            dq, queries, do, norm, dot_out, k, v, log_beta, k_t, v_t, i, i0, first, lo, full, T, scaling, softcap,
            D, BD, BN, HAS_CAP, True, False,
        )  # fmt: skip
    dq = _queries_part(
        dq, queries, do, norm, dot_out, k, v, log_beta, k_t, v_t, i, i0, first, tl.maximum(lo, full), near, T, scaling,
        softcap, D, BD, BN, HAS_CAP, False, False,
    )  # fmt: skip
    dq = _queries_part(
        dq, queries, do, norm, dot_out, k, v, log_beta, k_t, v_t, i, i0, first, tl.maximum(lo, near), hi, T, scaling,
        softcap, D, BD, BN, HAS_CAP, True, RAGGED,
    )  # fmt: skip
    _store(dq_ptr + row * dq_b + head * dq_h, i, dq_t, T, dq * scaling, D, BD)
