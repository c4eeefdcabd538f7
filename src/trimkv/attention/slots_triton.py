"""Slot attention as fused kernels: one pass over the slots writes, attends and finds the next slot to give up.

Decode. One program owns all G query heads of a KV head and a part of its slots. What a token is worth at the next step
is known before this one is done, so the search for the lowest score rides along: one more program a head, which reads
8 bytes a slot beside the 4 D bytes of keys and values (in their loop, each block would wait for its scores). Where rows
and heads are too few to fill the device, the slots are split over several programs, whose partial results a second
kernel joins (flash-decoding), or, where the caller has counters to lend, the program of a head that arrives last: in
the order of the slots, so that the same input gives the same bits. The slot that is overwritten is never used: every
program leaves it out, and the first one of a head starts its softmax from the new key and value themselves. So it does
not matter when the store is written.

Chunk. A forward-only flash attention over two sources of keys, the store's slots and the chunk's own tokens, so that
nobody concatenates them. The G query heads of a KV head lie in one block of queries: keys are read once for all.

Keys and values of empty slots are neither used nor read. All logits are in fp32 and in base 2.

Shapes: B rows, T new tokens, C slots, H KV heads, Q query heads, G = Q/H, D head dim. Names in kernels: BN keys and BM
query rows in a block, BG the group and BD the head dim as powers of two; i, j the indices of queries and keys; x
logits; top and total a running softmax.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import device, overlap
from . import slots
from .decay_triton import EXACT, LOG2E, NOTHING, _scaled, _strides

SCORES = ("retention", "position", "none")
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(2**31 - 1)  # position of what is no candidate
PARTS = tl.constexpr(16)  # partial results that are joined at a time
FETCHED = tl.constexpr(8)  # likewise, by the program that arrives last
RETENTION, NO_SCORE = tl.constexpr("retention"), tl.constexpr("none")
# Head dim up to: block sizes, warps, stages. For 128 the best of a sweep on an H200, else by compiling for sm_90
# (registers, shared memory), not timed.
DECODE = {64: (64, 4, 4), 128: (64, 4, 2), 256: (32, 4, 3)}  # BN, warps, stages
DECODE_LONG = {**DECODE, 128: (64, 4, 3)}  # with more than LONG slots
DECODE_FP32 = {64: (32, 4, 3), 128: (32, 4, 3), 256: (16, 8, 3)}
DECODE_SMALL = {64: (64, 4, 3), 128: (64, 4, 2), 256: (32, 4, 2)}  # for 99 KB of shared memory
CHUNK = {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)}  # BM, BN, warps, stages
CHUNK_FP32 = {64: (32, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 32, 4, 1)}
CHUNK_SMALL = {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)}
LONG = 2048
RESIDENT, RESIDENT_LONG = 2, 3  # decode programs that share a multiprocessor
MAX_SPLITS = 64  # parts of a head
SEARCH = 2048  # slots that a search looks at at a time


class Decoded(NamedTuple):
    """What a decode step gives; what was not asked for is an empty tensor.

    Attributes:
        out: [B, Q, D] in the dtype of q; zeros where nothing was written.
        next_slot: [B, H] in the dtype of slot, where the next token goes: ``slots.victim`` of the updated store.
        lse: fp32 [B, Q], log-sum-exp of the logits, s_aux included; inf where nothing was written.
        probabilities: fp32 [B, H, C], the weight of each slot, summed over the query heads of the group.
    """

    out: torch.Tensor
    next_slot: torch.Tensor
    lse: torch.Tensor
    probabilities: torch.Tensor


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the kernels cannot do this, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels take fp32, bf16 and fp16, not {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"the Triton kernels need one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] > 256 or not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return f"the Triton kernels need one head dim of at most 256, not {k.shape[-1]} and {v.shape[-1]}"
    if not device.runs_kernels(q):
        return "the Triton kernels need CUDA tensors (or TRITON_INTERPRET=1)"
    return None


def decode(
    q_BQD: torch.Tensor,
    k_new_BHD: torch.Tensor,
    v_new_BHD: torch.Tensor,
    k_BHCD: torch.Tensor,
    v_BHCD: torch.Tensor,
    position_BHC: torch.Tensor,
    slot_BH: torch.Tensor,
    now_B: torch.Tensor,
    scaling: float,
    log_beta_new_BH: torch.Tensor | None = None,
    log_beta_BHC: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux_Q: torch.Tensor | None = None,
    score: str = "retention",
    sinks: int = 0,
    recent: int = 0,
    offset: int = 0,
    used: int | None = None,
    any_empty: bool = True,
    lse: bool = False,
    probabilities: bool = False,
    splits: int | None = None,
    next_slot_BH: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> Decoded:
    """One token per row: writes it into its slot, attends, and finds the slot of the token after it.

    The store (k, v, position, log_beta) is changed in place. One operator for torch.compile, nothing for the host to
    wait for, the same launches whatever the tensors hold.

    Args:
        q_BQD, k_new_BHD, v_new_BHD, log_beta_new_BH: the new tokens, rotated.
        k_BHCD, v_BHCD, position_BHC (int32, -1 = empty), log_beta_BHC (fp32): the store; its positions are below now.
        slot_BH: int32 or int64; where each token goes. -1 writes nothing: padding, or a row without a request.
        now_B: int32, the positions of the new tokens.
        scaling, softcap, s_aux_Q: see ``reference.slot_attention``.
        score: by which the next slot is found. "retention": log_beta * (next - position + offset), next being now + 1
            (now, where nothing was written); "position": the oldest goes; "none": nothing is looked for.
        sinks, recent: tokens of position < sinks and >= next - recent stay, as ``slots.protect`` has it. A layer that
            counts the arriving token among its recent ones gives one less here.
        offset: 1 for the ages of the released code (policy trimkv, distance="reference").
        used: only the first so many slots may hold tokens, slot_BH included; None: all.
        any_empty: False if the caller knows that each of them does, but for those written now: keys then need not
            wait for positions.
        lse, probabilities: whether to return them.
        splits: programs per head; None decides by the device.
        next_slot_BH: where to put the next slots, int32 or int64, dense; not slot_BH itself, which is read meanwhile.
        counters: B * H zeros, int32, that this call may use and leaves zero: of one stream's calls. Parts of a head are
            then joined in the same launch.
    """
    _check(q_BQD, k_BHCD, score, log_beta_new_BH, log_beta_BHC)
    got = Decoded(
        *torch.ops.trimkv.decode_slots(
            *(q_BQD, k_new_BHD, v_new_BHD, k_BHCD, v_BHCD, position_BHC, slot_BH, now_B, scaling),
            *(log_beta_new_BH, log_beta_BHC, softcap, s_aux_Q, score, sinks, recent, offset, used, any_empty),
            *(lse, probabilities, splits, next_slot_BH, counters),
        )
    )
    return got if next_slot_BH is None else got._replace(next_slot=next_slot_BH)


def decode_reference(
    q, k_new, v_new, k, v, position, slot, now, scaling, log_beta_new=None, log_beta=None, softcap=None, s_aux_Q=None,
    score="retention", sinks=0, recent=0, offset=0, used=None, any_empty=True, lse=False, probabilities=False,
    splits=None, next_slot_out=None, counters=None,
) -> Decoded:  # fmt: skip
    """``decode`` in plain torch and fp32: the truth, and what runs on the CPU."""
    (B, Q, D), H = q.shape, k.shape[1]
    writes, index = slot >= 0, slot.clamp_min(0).long()[..., None]

    def write(held: torch.Tensor, new: torch.Tensor) -> None:
        at = index if held.ndim == 3 else index[..., None].expand(-1, -1, 1, held.shape[-1])
        mask = writes.view(B, H, *(1,) * (held.ndim - 2))
        held.scatter_(2, at, torch.where(mask, new.to(held.dtype).unsqueeze(2), held.gather(2, at)))

    write(k, k_new)
    write(v, v_new)
    write(position, now[:, None].expand(B, H))
    if log_beta is not None:
        write(log_beta, log_beta_new)

    held, keys, values = position[:, :, :used], k[:, :, :used].float(), v[:, :, :used].float()
    seen = (held >= 0) & writes[..., None]
    if any_empty:  # what they hold may be NaN
        keys, values = (x.masked_fill(~seen[..., None], 0.0) for x in (keys, values))
    x = q.reshape(B, H, Q // H, D).float() @ keys.transpose(2, 3) * scaling
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    x = x.masked_fill(~seen[:, :, None], float("-inf"))
    norm = x.logsumexp(-1, keepdim=True)
    if s_aux_Q is not None:
        norm = torch.logaddexp(norm, s_aux_Q.float().view(1, H, -1, 1))
    idle = ~writes[..., None, None]
    norm = norm.masked_fill(idle, float("inf"))
    weights = (x - norm).exp().masked_fill(idle, 0.0)
    out = (weights @ values).masked_fill(idle, 0.0).reshape(B, Q, D).to(q.dtype)

    next_slot, norms, shares = _others(q, slot, k, score, lse, probabilities, next_slot_out)
    if score != "none":
        next_now = now[:, None, None] + writes[..., None].int()
        worth = held.float() if score == "position" else log_beta[:, :, :used] * (next_now + offset - held)
        worth = slots.protect(worth, held, sinks, next_now - recent if recent else None)
        (next_slot if next_slot_out is None else next_slot_out).copy_(slots.victim(worth, held)[..., 0])
    if lse:
        norms.copy_(norm.reshape(B, Q))
    if probabilities:
        shares.zero_()[:, :, :used] = weights.sum(2)
    return Decoded(out, next_slot, norms, shares)


def attend_chunk(
    q_BQTD: torch.Tensor,
    k_new_BHTD: torch.Tensor,
    v_new_BHTD: torch.Tensor,
    new_position_BT: torch.Tensor,
    k_BHCD: torch.Tensor,
    v_BHCD: torch.Tensor,
    position_BHC: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux_Q: torch.Tensor | None = None,
    used: int | None = None,
    any_empty: bool = True,
    lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T queries per row over the slots and over their own tokens, by the position rule. Nothing is written.

    Args:
        q_BQTD, k_new_BHTD, v_new_BHTD: the chunk, rotated.
        new_position_BT: int32; rises from token to token, all above those of the slots; -1 is padding.
        k_BHCD, v_BHCD, position_BHC, used: the store, as for ``decode``; C may be 0.
        any_empty: False if the caller knows that the used slots are all taken and that the chunk has no padding.
        lse: whether to return it.

    Returns:
        out [B, Q, T, D] in the dtype of q, zeros for padding; lse fp32 [B, Q, T], inf for padding, or an empty tensor.
    """
    return torch.ops.trimkv.attend_chunk(
        *(q_BQTD, k_new_BHTD, v_new_BHTD, new_position_BT, k_BHCD, v_BHCD, position_BHC),
        *(scaling, softcap, s_aux_Q, used, any_empty, lse),
    )


def attend_chunk_reference(
    q, k_new, v_new, new_position, k, v, position, scaling, softcap=None, s_aux_Q=None, used=None, any_empty=True,
    lse=False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``attend_chunk`` in plain torch and fp32: the truth, and what runs on the CPU."""
    B, H, T, _ = k_new.shape
    new_position_BHT = new_position[:, None].expand(B, H, T)
    position = torch.cat([position[:, :, :used], new_position_BHT], 2)
    k, v = torch.cat([k[:, :, :used], k_new], 2).float(), torch.cat([v[:, :, :used], v_new], 2).float()
    if any_empty:
        k, v = (x.masked_fill((position < 0)[..., None], 0.0) for x in (k, v))
    blank = (new_position < 0)[:, None, :, None]
    q = q.masked_fill(blank, 0.0)
    out, norm, _ = slots.attend_with_lse(q.float(), k, v, new_position, position, scaling, softcap, s_aux_Q)
    result, result_norm = _chunk_outputs(q, lse)
    result.copy_(out.masked_fill(blank, 0.0))
    if lse:
        result_norm.copy_(norm.masked_fill(blank[..., 0], float("inf")))
    return result, result_norm


def _check(q, k, score, log_beta_new, log_beta) -> None:
    assert score in SCORES, score
    assert score != "retention" or log_beta is not None, "score='retention' reads log_beta"
    assert (log_beta is None) == (log_beta_new is None), "log_beta of the store and of the new token go together"
    assert q.shape[1] % k.shape[1] == 0, (q.shape, k.shape)


def _others(q, slot, k, score, lse, probabilities, next_slot_out):
    """Decoded's tensors beside the first, unwritten; what the caller holds already is not among them."""

    def empty(shape, dtype):
        return torch.empty(shape, dtype=dtype, device=q.device)

    return (
        empty(slot.shape if score != "none" and next_slot_out is None else (0,), slot.dtype),
        empty(q.shape[:2] if lse else (0,), torch.float32),
        empty(k.shape[:3] if probabilities else (0,), torch.float32),
    )


def _chunk_outputs(q, lse):
    """out in memory as the layer's output projection reads it, and lse, unwritten."""
    B, Q, T, D = q.shape
    out = torch.empty(B, T, Q, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    return out, torch.empty((B, Q, T) if lse else (0,), dtype=torch.float32, device=q.device)


DECODE_SCHEMA = (
    "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k, Tensor(b!) v, Tensor(c!) position, Tensor slot, Tensor now, "
    "float scaling, Tensor? log_beta_new, Tensor(d!)? log_beta, float? softcap, Tensor? s_aux, str score, int sinks, "
    "int recent, int offset, SymInt? used, bool any_empty, bool lse, bool probabilities, int? splits, "
    "Tensor(e!)? next_slot, Tensor(f!)? counters) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
CHUNK_SCHEMA = (
    "(Tensor q, Tensor k_new, Tensor v_new, Tensor new_position, Tensor k, Tensor v, Tensor position, float scaling, "
    "float? softcap, Tensor? s_aux, SymInt? used, bool any_empty, bool lse) -> (Tensor, Tensor)"
)
STORE = ("k", "v", "position", "log_beta")


@torch.library.custom_op("trimkv::decode_slots", mutates_args=(*STORE, "next_slot", "counters"), schema=DECODE_SCHEMA)
def _decode_op(*args):
    return tuple((_decode_triton if device.runs_kernels(args[0]) else decode_reference)(*args))


@_decode_op.register_fake
def _decode_fake(
    q, k_new, v_new, k, v, position, slot, now, scaling, log_beta_new, log_beta, softcap, s_aux, score, sinks, recent,
    offset, used, any_empty, lse, probabilities, splits, next_slot, counters,
):  # fmt: skip
    return q.new_empty(q.shape), *_others(q, slot, k, score, lse, probabilities, next_slot)


@torch.library.custom_op("trimkv::attend_chunk", mutates_args=(), schema=CHUNK_SCHEMA)
def _chunk_op(*args):
    return (_chunk_triton if device.runs_kernels(args[0]) else attend_chunk_reference)(*args)


@_chunk_op.register_fake
def _chunk_fake(
    q, k_new, v_new, new_position, k, v, position, scaling, softcap, s_aux, used, any_empty, lse
):  # fmt: skip
    return _chunk_outputs(q, lse)


def _decode_triton(
    q, k_new, v_new, k, v, position, slot, now, scaling, log_beta_new, log_beta, softcap, s_aux, score, sinks, recent,
    offset, used, any_empty, lse, probabilities, splits, next_slot_out, counters,
):  # fmt: skip
    _refuse(q, k, v)
    assert position.dtype == torch.int32 and (log_beta is None or log_beta.dtype == torch.float32)
    assert position.stride(-1) == 1 and (log_beta is None or log_beta.stride(-1) == 1)
    (B, Q, D), (H, C) = q.shape, k.shape[1:3]
    G, used = Q // H, C if used is None else used
    q, k_new, v_new = (_dense(x) for x in (q, k_new, v_new))
    slot, now = slot.contiguous(), now.contiguous()
    log_beta_new = None if log_beta is None else log_beta_new.contiguous()
    table = DECODE_LONG if used > LONG else DECODE
    BN, num_warps, num_stages = _config(table, DECODE_FP32, DECODE_SMALL, q, any_empty)
    splits = splits or _splits(B * H, triton.cdiv(used, BN), q, RESIDENT_LONG if used > LONG else RESIDENT)
    per = triton.cdiv(triton.cdiv(used, BN), splits) * BN  # slots of one program

    def floats(*shape):
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert next_slot_out is None or next_slot_out.is_contiguous()
    next_slot, norm, shares = _others(q, slot, k, score, lse, probabilities, next_slot_out)
    if probabilities and not lse:
        norm = floats(B, Q)
    logits = floats(B, Q, used) if probabilities else None
    acc = top = total = None
    if splits > 1:
        acc, top, total = floats(B * H, splits, G, D), floats(B * H, splits, G), floats(B * H, splits, G)
    shape = dict(G=G, D=D, BD=_pad(D), HAS_LSE=lse or probabilities)
    joins = splits > 1 and counters is not None
    assert not joins or counters.dtype == torch.int32 and counters.numel() >= B * H
    early = overlap.overlaps(q)
    with torch.cuda.device_of(q):
        # The search comes last: it takes the places of those that are done.
        _decode_kernel[(B * H, splits + (score != "none"))](
            *(q, k_new, v_new, log_beta_new, k, v, position, log_beta, slot, now),
            *(None if s_aux is None else s_aux.float(), out, norm),
            *(next_slot if next_slot_out is None else next_slot_out, logits, acc, top, total),
            *(counters if joins else None,),
            *(*q.stride()[:2], *k_new.stride()[:2], *v_new.stride()[:2], *_strides(k, v)),
            *(*position.stride()[:2], *(position if log_beta is None else log_beta).stride()[:2]),
            *(H, used, per, scaling, softcap or 0.0, sinks, recent, offset),
            **shape,
            BG=_pad(G),
            BN=BN,
            SN=min(max(128, triton.next_power_of_2(C)), SEARCH),
            SCORE=score,
            ANY_EMPTY=any_empty,
            HAS_BETA=log_beta is not None,
            HAS_CAP=softcap is not None,
            HAS_AUX=s_aux is not None,
            KEEP_LOGITS=probabilities,
            SPLIT=splits > 1,
            JOINS=joins,
            GP=triton.next_power_of_2(G),
            EARLY=early,
            num_warps=num_warps,
            num_stages=num_stages,
            **overlap.launch(early),
        )
        if splits > 1 and not joins:
            _join_kernel[(B * Q,)](acc, top, total, out, norm, splits, **shape, num_warps=4)
        if probabilities:
            _shares_kernel[(B * H, triton.cdiv(C, 256))](logits, norm, shares, C, used, G=G, BN=256, num_warps=4)
    return Decoded(out, next_slot, norm if lse else norm.new_empty(0), shares)


def _chunk_triton(q, k_new, v_new, new_position, k, v, position, scaling, softcap, s_aux, used, any_empty, lse):
    _refuse(q, k, v)
    (B, Q, T, D), (H, C) = q.shape, k.shape[1:3]
    G, used = Q // H, C if used is None else used
    q, k_new, v_new = (_dense(x) for x in (q, k_new, v_new))
    new_position = new_position.contiguous()
    BM, BN, num_warps, num_stages = _config(CHUNK, CHUNK_FP32, CHUNK_SMALL, q, any_empty)
    out, norm = _chunk_outputs(q, lse)
    with torch.cuda.device_of(q):
        _chunk_kernel[(B * H, triton.cdiv(T * G, BM))](
            *(q, k_new, v_new, new_position, k, v, position, None if s_aux is None else s_aux.float(), out, norm),
            *(*_strides(q, k_new, v_new, k, v, out), *position.stride()[:2]),
            *(H, T, used, scaling, softcap or 0.0),
            G=G,
            D=D,
            BD=_pad(D),
            BM=BM,
            BN=BN,
            ANY_EMPTY=any_empty,
            HAS_CAP=softcap is not None,
            HAS_AUX=s_aux is not None,
            HAS_LSE=lse,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out, norm


def _refuse(q, k, v) -> None:
    reason = unsupported(q, k, v)
    if reason:
        raise ValueError(f"{reason}; use the plain torch path of attention/slots.py")
    assert k.stride(-1) == v.stride(-1) == 1, "the store is written in place and its last dimension is dense"


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pad(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _config(table, fp32_table, small_table, q, any_empty) -> tuple:
    D = q.shape[-1]
    if q.dtype == torch.float32:
        table = fp32_table
    elif not device.much_shared_memory(q):
        table = small_table
    *blocks, num_warps, num_stages = table[64 if D <= 64 else 128 if D <= 128 else 256]
    # Positions are loaded ahead of the keys that they mask: twice as far for as many keys in flight.
    return *blocks, num_warps, 2 * num_stages - 1 if any_empty else num_stages


def _splits(heads: int, blocks: int, x: torch.Tensor, resident: int) -> int:
    """Programs per head, so that their waves over the device are nearly full: the fewest within 15 % of the best."""
    if not x.is_cuda:
        return 1
    places = resident * device.multiprocessors(x)
    efficiency = {}
    for splits in range(1, min(blocks, MAX_SPLITS) + 1):
        longest = triton.cdiv(blocks, splits)
        if triton.cdiv(blocks, longest) == splits:  # else some would have nothing to do
            efficiency[splits] = heads * blocks / (triton.cdiv(heads * splits, places) * places * longest)
    best = max(efficiency.values(), default=0.0)
    return min((splits for splits, x in efficiency.items() if x >= 0.85 * best), default=1)


@triton.jit
def _read(ptr, rows, stride, seen, D: tl.constexpr, BD: tl.constexpr):
    """Rows of a [S, D] matrix as [rows, BD]; those not seen are zeros and not read."""
    column = tl.arange(0, BD)
    mask = seen[:, None]
    if D != BD:
        mask = mask & (column[None, :] < D)
    return tl.load(ptr + rows[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _soften(acc, total, top, x, values):
    """Takes the values of a block of keys, of logits x [queries, keys], into a running softmax."""
    new_top = tl.maximum(top, tl.max(x, 1))
    weights = tl.exp2(x - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=EXACT)
    return acc, total, new_top


@triton.jit
def _worth(log_beta, position, next_now, sinks, recent, offset, SCORE: tl.constexpr):
    """slots.protect: the score of each token, -inf where there is none."""
    if SCORE == RETENTION:
        score = log_beta * (next_now + offset - position).to(tl.float32)
    else:
        score = (position * 0).to(tl.float32)  # all equal: the oldest goes
    kept = (position < sinks) | ((recent > 0) & (position >= next_now - recent))
    score = tl.where(kept, float("inf"), score)
    return tl.where(position < 0, float("-inf"), score)


@triton.jit
def _worse(score, position, slot, other_score, other_position, other_slot):
    """slots.victim, pair by pair: the lower score, then the older token, then the first slot."""
    older = (other_position < position) | ((other_position == position) & (other_slot < slot))
    take = (other_score < score) | ((other_score == score) & older)
    score = tl.where(take, other_score, score)
    return score, tl.where(take, other_position, position), tl.where(take, other_slot, slot)


@triton.jit
def _worst(score, position, slot):
    """slots.victim of a vector: the first slot of the oldest token of the lowest score."""
    lowest = tl.min(score, 0)
    position = tl.where(score == lowest, position, NEVER)
    oldest = tl.min(position, 0)
    return lowest, oldest, tl.min(tl.where((score == lowest) & (position == oldest), slot, NEVER), 0)


@triton.jit
def _search(
    next_slot, position, log_beta, at, writes, new_position, new_beta, used, sinks, recent, offset,
    SN: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """The victim of the store as it will be: slot ``at`` is being written by another program and is not read here."""
    next_now = new_position + writes.to(tl.int32)
    worst = tl.full([SN], float("inf"), tl.float32)
    worst_position = tl.full([SN], NEVER, tl.int32)
    worst_slot = tl.zeros([SN], tl.int32)
    for j0 in range(0, used, SN):
        j = j0 + tl.arange(0, SN)
        held = (j < used) & (j != at)
        positions = tl.load(position + j, mask=held, other=NEVER)
        if SCORE == RETENTION:
            betas = tl.load(log_beta + j, mask=held, other=0.0)
        else:
            betas = 0.0
        score = _worth(betas, positions, next_now, sinks, recent, offset, SCORE)
        score = tl.where(held, score, float("inf"))
        worst, worst_position, worst_slot = _worse(worst, worst_position, worst_slot, score, positions, j)
    lowest, oldest, first = _worst(worst, worst_position, worst_slot)
    score = _worth(new_beta, new_position, next_now, sinks, recent, offset, SCORE)
    score = tl.where(writes, score, float("inf"))
    candidate = tl.where(writes, new_position, NEVER)
    lowest, oldest, first = _worse(lowest, oldest, first, score, candidate, at)
    tl.store(next_slot, first.to(next_slot.dtype.element_ty))


@triton.jit
def _join(
    part_acc, part_top, part_total, out, lse, n, parts,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Joins the parts of all query heads of a KV head, first to last: first their tops, then sums that need no other's,
    so that loads wait for nothing but each other."""
    group, column = tl.arange(0, GP), tl.arange(0, BD)
    member = group < G
    mask = member[:, None] & (column < D)[None, :]
    top = tl.zeros([GP], tl.float32) + NOTHING
    for s0 in range(0, parts, FETCHED):
        for i in tl.static_range(FETCHED):
            given = member & (s0 + i < parts)
            at = (n * parts + s0 + i) * G + group
            top = tl.maximum(top, tl.load(part_top + at, mask=given, other=NOTHING, cache_modifier=".cg"))
    acc = tl.zeros([GP, BD], tl.float32)
    total = tl.zeros([GP], tl.float32)
    for s0 in range(0, parts, FETCHED):
        for i in tl.static_range(FETCHED):
            given = member & (s0 + i < parts)
            at = (n * parts + s0 + i) * G + group
            fade = tl.exp2(tl.load(part_top + at, mask=given, other=NOTHING, cache_modifier=".cg") - top)
            total += fade * tl.load(part_total + at, mask=given, other=0.0, cache_modifier=".cg")
            at = at[:, None] * D + column[None, :]
            given = mask & (s0 + i < parts)
            acc += fade[:, None] * tl.load(part_acc + at, mask=given, other=0.0, cache_modifier=".cg")
    idle = total == 0.0
    total = tl.where(idle, 1.0, total)
    at = (n * G + group)[:, None] * D + column[None, :]
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
    if HAS_LSE:
        tl.store(lse + n * G + group, tl.where(idle, float("inf"), (top + tl.log2(total)) * LN2), mask=member)


@triton.jit(do_not_specialize=["used", "per"])
def _decode_kernel(
    q, k_new, v_new, log_beta_new, k, v, position, log_beta, slot, now,
    s_aux, out, lse, next_slot, logits, part_acc, part_top, part_total, counters,
    q_b, q_h, kn_b, kn_h, vn_b, vn_h, k_b, k_h, k_t, v_b, v_h, v_t, p_b, p_h, lb_b, lb_h,
    H, used, per, scaling, softcap, sinks, recent, offset,
    G: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, SN: tl.constexpr,
    SCORE: tl.constexpr, ANY_EMPTY: tl.constexpr, HAS_BETA: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_AUX: tl.constexpr, HAS_LSE: tl.constexpr, KEEP_LOGITS: tl.constexpr, SPLIT: tl.constexpr,
    JOINS: tl.constexpr, GP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Programs [head, part]: all parts but the last attend to slots of theirs, the last searches."""
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row, head = n // H, n % H
    if EARLY:
        overlap.let_next_begin()
        overlap.wait()
    at = tl.load(slot + n).to(tl.int32)
    new_position = tl.load(now + row).to(tl.int32)
    writes = at >= 0
    k += row * k_b + head * k_h
    v += row * v_b + head * v_h
    position += row * p_b + head * p_h
    new_beta = 0.0
    if HAS_BETA:
        log_beta += row * lb_b + head * lb_h
        new_beta = tl.load(log_beta_new + n).to(tl.float32)
    parts = tl.num_programs(1)
    if SCORE != NO_SCORE:
        parts -= 1
    if part == parts:
        if SCORE != NO_SCORE:
            _search(
                next_slot + n, position, log_beta, at, writes, new_position, new_beta, used, sinks, recent, offset,
                SN, SCORE,
            )  # fmt: skip
    else:
        group = tl.arange(0, BG)
        column = tl.arange(0, BD)
        member = group < G
        queries = _read(q + row * q_b + head * G * q_h, group, q_h, member, D, BD)

        # The new token, in the first part: into the store, and first into the softmax.
        mine = writes & (part == 0)
        mask = (column < D) & mine
        new_key = tl.load(k_new + row * kn_b + head * kn_h + column, mask=mask, other=0.0)
        new_value = tl.load(v_new + row * vn_b + head * vn_h + column, mask=mask, other=0.0)
        tl.store(k + at * k_t + column, new_key, mask=mask)
        tl.store(v + at * v_t + column, new_value, mask=mask)
        tl.store(position + at, new_position, mask=mine)
        if HAS_BETA:
            tl.store(log_beta + at, new_beta, mask=mine)
        dot = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32)[None, :], 1)
        new_x = tl.where(mine, _scaled(dot, scaling, softcap, HAS_CAP), float("-inf"))
        if KEEP_LOGITS:
            logits += n * G * used
            tl.store(logits + group * used + at, new_x, mask=member & mine)
        top = tl.maximum(new_x, NOTHING)
        if HAS_AUX:
            aux = tl.load(s_aux + head * G + group, mask=member & mine, other=float("-inf")) * LOG2E
            top = tl.maximum(top, aux)
        total = tl.exp2(new_x - top)
        acc = total[:, None] * new_value.to(tl.float32)[None, :]
        if HAS_AUX:
            total += tl.exp2(aux - top)

        lo = part * per
        hi = tl.minimum(lo + per, used)
        for j0 in range(lo, hi, BN):
            j = j0 + tl.arange(0, BN)
            held = (j < hi) & (j != at)
            seen = held & writes
            if ANY_EMPTY:
                seen = seen & (tl.load(position + j, mask=held, other=-1) >= 0)
            keys = _read(k, j, k_t, seen, D, BD)
            x = _scaled(tl.dot(queries, tl.trans(keys), input_precision=EXACT), scaling, softcap, HAS_CAP)
            x = tl.where(seen[None, :], x, float("-inf"))
            if KEEP_LOGITS:
                tl.store(logits + group[:, None] * used + j[None, :], x, mask=member[:, None] & held[None, :])
            values = _read(v, j, v_t, seen, D, BD)
            acc, total, top = _soften(acc, total, top, x, values)

        if SPLIT:
            at_part = (n * parts + part) * G + group
            tl.store(part_top + at_part, top, mask=member)
            tl.store(part_total + at_part, total, mask=member)
            at_part = at_part[:, None] * D + column[None, :]
            tl.store(part_acc + at_part, acc, mask=member[:, None] & (column < D)[None, :])
            if JOINS:
                tl.debug_barrier()  # all threads have stored before one of them says so
                arrived = tl.atomic_add(counters + n, 1, sem="acq_rel")
                if arrived == parts - 1:
                    _join(part_acc, part_top, part_total, out, lse, n, parts, G, GP, D, BD, HAS_LSE)
                    tl.store(counters + n, 0)
        else:
            idle = total == 0.0  # only a row that writes nothing has no weight at all
            total = tl.where(idle, 1.0, total)
            acc = acc / total[:, None]
            at_out = (n * G + group)[:, None] * D + column[None, :]
            tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=member[:, None] & (column < D)[None, :])
            if HAS_LSE:
                norm = tl.where(idle, float("inf"), (top + tl.log2(total)) * LN2)
                tl.store(lse + n * G + group, norm, mask=member)


@triton.jit(do_not_specialize=["parts"])
def _join_kernel(
    part_acc, part_top, part_total, out, lse, parts,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Joins the parts of one query head."""
    n = tl.program_id(0).to(tl.int64) // G
    member = tl.program_id(0) % G
    column = tl.arange(0, BD)
    acc = tl.zeros([BD], tl.float32)
    top = NOTHING
    total = 0.0
    for s0 in range(0, parts, PARTS):
        s = s0 + tl.arange(0, PARTS)
        at = (n * parts + s) * G + member
        tops = tl.load(part_top + at, mask=s < parts, other=NOTHING)
        totals = tl.load(part_total + at, mask=s < parts, other=0.0)
        mask = (s < parts)[:, None] & (column < D)[None, :]
        accs = tl.load(part_acc + at[:, None] * D + column[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        fades = tl.exp2(tops - new_top)
        fade = tl.exp2(top - new_top)
        acc = acc * fade + tl.sum(accs * fades[:, None], 0)
        total = total * fade + tl.sum(totals * fades, 0)
        top = new_top
    idle = total == 0.0
    total = tl.where(idle, 1.0, total)
    at_out = tl.program_id(0).to(tl.int64) * D + column
    tl.store(out + at_out, (acc / total).to(out.dtype.element_ty), mask=column < D)
    if HAS_LSE:
        tl.store(lse + tl.program_id(0), tl.where(idle, float("inf"), (top + tl.log2(total)) * LN2))


@triton.jit(do_not_specialize=["used"])
def _shares_kernel(logits, lse, shares, C, used, G: tl.constexpr, BN: tl.constexpr):
    """The weights of all slots from their logits, summed over the group."""
    n = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    for member in range(G):
        norm = tl.load(lse + n * G + member) * LOG2E
        x = tl.load(logits + (n * G + member) * used + j, mask=j < used, other=float("-inf"))
        total += tl.exp2(x - norm)
    tl.store(shares + n * C + j, total, mask=j < C)


@triton.jit
def _chunk_part(
    acc, total, top, queries, k, v, position, k_t, v_t, i, lo, hi, scaling, softcap,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    ANY_EMPTY: tl.constexpr, RAGGED: tl.constexpr, CAUSAL: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    for j0 in range(lo, hi, BN):
        j = j0 + tl.arange(0, BN)
        if ANY_EMPTY:
            seen = tl.load(position + j, mask=j < hi, other=-1) >= 0
        else:
            seen = j < hi
        if ANY_EMPTY or RAGGED or D != BD:
            keys = _read(k, j, k_t, seen, D, BD)
        else:
            keys = tl.load(k + j[:, None] * k_t + tl.arange(0, BD)[None, :])
        x = _scaled(tl.dot(queries, tl.trans(keys), input_precision=EXACT), scaling, softcap, HAS_CAP)
        if CAUSAL:
            x = tl.where(seen[None, :] & (j[None, :] <= i[:, None]), x, float("-inf"))
        elif ANY_EMPTY or RAGGED:
            x = tl.where(seen[None, :], x, float("-inf"))
        if ANY_EMPTY or RAGGED or D != BD:
            values = _read(v, j, v_t, seen, D, BD)
        else:
            values = tl.load(v + j[:, None] * v_t + tl.arange(0, BD)[None, :])
        acc, total, top = _soften(acc, total, top, x, values)
    return acc, total, top


@triton.jit(do_not_specialize=["T", "used"])
def _chunk_kernel(
    q, k_new, v_new, new_position, k, v, position, s_aux, out, lse,
    q_b, q_h, q_t, kn_b, kn_h, kn_t, vn_b, vn_h, vn_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t, p_b, p_h,
    H, T, used, scaling, softcap,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ANY_EMPTY: tl.constexpr, HAS_CAP: tl.constexpr, HAS_AUX: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Row r of a block of queries is query head r % G of token r // G."""
    n = tl.program_id(0).to(tl.int64)
    row, head = n // H, n % H
    r0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM  # the longest blocks first
    r = r0 + tl.arange(0, BM)
    i = r // G
    member = head * G + r % G
    inside = i < T
    k += row * k_b + head * k_h
    v += row * v_b + head * v_h
    position += row * p_b + head * p_h
    k_new += row * kn_b + head * kn_h
    v_new += row * vn_b + head * vn_h
    new_position += row * T
    column = tl.arange(0, BD)
    at = i.to(tl.int64)[:, None] * q_t + member[:, None] * q_h + column[None, :]
    queries = tl.load(q + row * q_b + at, mask=inside[:, None] & (column < D)[None, :], other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    if HAS_AUX:
        top = tl.load(s_aux + member) * LOG2E
        total = tl.zeros([BM], tl.float32) + 1.0
    else:
        top = tl.zeros([BM], tl.float32) + NOTHING
        total = tl.zeros([BM], tl.float32)
    # Slots that fill blocks, the last few slots; then the chunk: tokens before these queries, tokens among them.
    full = used // BN * BN
    if ANY_EMPTY:
        full = used
    acc, total, top = _chunk_part(
        acc, total, top, queries, k, v, position, k_t, v_t, i, 0, full, scaling, softcap,
        D, BD, BN, ANY_EMPTY, False, False, HAS_CAP,
    )  # fmt: skip
    if not ANY_EMPTY:
        acc, total, top = _chunk_part(
            acc, total, top, queries, k, v, position, k_t, v_t, i, full, used, scaling, softcap,
            D, BD, BN, False, True, False, HAS_CAP,
        )  # fmt: skip
    before = r0 // G // BN * BN
    acc, total, top = _chunk_part(
        acc, total, top, queries, k_new, v_new, new_position, kn_t, vn_t, i, 0, before, scaling, softcap,
        D, BD, BN, ANY_EMPTY, False, False, HAS_CAP,
    )  # fmt: skip
    acc, total, top = _chunk_part(
        acc, total, top, queries, k_new, v_new, new_position, kn_t, vn_t, i, before,
        tl.minimum((r0 + BM - 1) // G + 1, T), scaling, softcap,
        D, BD, BN, ANY_EMPTY, True, True, HAS_CAP,
    )  # fmt: skip
    acc = acc / total[:, None]
    norm = (top + tl.log2(total)) * LN2
    if ANY_EMPTY:
        blank = tl.load(new_position + i, mask=inside, other=-1) < 0
        acc = tl.where(blank[:, None], 0.0, acc)
        norm = tl.where(blank, float("inf"), norm)
    at = i.to(tl.int64)[:, None] * out_t + member[:, None] * out_h + column[None, :]
    tl.store(out + row * out_b + at, acc.to(out.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])
    if HAS_LSE:
        tl.store(lse + (row * H * G + member) * T + i, norm, mask=inside)
