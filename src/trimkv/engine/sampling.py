"""The next token of each row, chosen on the device: no host waits, no generator, the same for a row whatever runs."""

from collections.abc import Callable, Iterable

import torch

from .request import GREEDY, KINDS, LIMITED, MAX_TOP_K, SamplingParams
from .rows import Rows

# Multipliers of MurmurHash3's finalisers (Appleby, public domain), as signed numbers.
MIX32 = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32
MIX64 = 0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64
ODD = 0x9E3779B97F4A7C15 - 2**64


def kind_of(many: Iterable[SamplingParams]) -> str:
    """The least kind of step that serves all of these requests."""
    return max((one.kind for one in many), key=KINDS.index, default=GREEDY)


def kernels(device: torch.device) -> Callable[[torch.Tensor, Rows, str], None] | None:
    """``choose`` and ``Rows.advance`` in two launches, where they can run; else None."""
    if device.type != "cuda":
        return None
    try:
        from .sampling_triton import choose_and_advance
    except ImportError:  # a build of torch without triton
        return None
    return choose_and_advance


def choose(logits_BV: torch.Tensor, rows: Rows, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row.

    In the order of transformers: repetition penalty, temperature, top-k, top-p. A row of temperature 0 takes its
    largest logit. The others add Gumbel noise, a function of (seed, tokens produced, vocabulary index), and take the
    largest: that is a draw from the softmax.

    Args:
        kind: of KINDS; no row asks for more.

    Returns:
        int64 [B]; bool [B], False where the largest logit is not a finite number.
    """
    if kind == GREEDY:
        best = logits_BV.max(-1)
        return best.indices, best.values.isfinite()
    x = drawn = adjusted(logits_BV, rows)
    if kind == LIMITED:
        drawn = x.masked_fill(x < lowest_kept(x, rows.top_k, rows.top_p)[:, None], float("-inf"))
    drawn = drawn + gumbel(rows.seed, rows.produced, x.shape[1])
    best = torch.where((rows.temperature > 0)[:, None], drawn, x).max(-1)
    return best.indices, best.values.isfinite()


def adjusted(logits_BV: torch.Tensor, rows: Rows) -> torch.Tensor:
    """fp32 [B, V]: logits after repetition penalty and temperature."""
    x, penalty, temperature = logits_BV.float(), rows.penalty[:, None], rows.temperature[:, None]
    x = torch.where(rows.seen, torch.where(x > 0, x / penalty, x * penalty), x)
    return x / temperature.where(temperature > 0, 1.0)


def lowest_kept(x_BV: torch.Tensor, top_k_B: torch.Tensor, top_p_B: torch.Tensor) -> torch.Tensor:
    """fp32 [B]: tokens with a smaller logit are not drawn. -inf in rows without top-k and top-p.

    Only the 1,024 largest logits are looked at, since sorting a whole vocabulary costs more than a layer of a model.
    """
    top = x_BV.topk(min(MAX_TOP_K, x_BV.shape[1]), dim=-1).values
    limited = (top_k_B > 0)[:, None]
    within = torch.arange(top.shape[1], device=top.device) < top_k_B[:, None]
    among = top.masked_fill(~within, float("-inf")).logsumexp(-1, keepdim=True)
    share = (top - torch.where(limited, among, x_BV.logsumexp(-1, keepdim=True))).exp()
    before = share.cumsum(-1) - share  # probability of the tokens ranked higher
    kept = (within | ~limited) & ((before < top_p_B[:, None]) | (top_p_B >= 1)[:, None])
    lowest = top.masked_fill(~kept, float("inf")).amin(-1)
    return lowest.masked_fill((top_k_B == 0) & (top_p_B >= 1), float("-inf"))


def gumbel(seed_B: torch.Tensor, step_B: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """fp32 [B, V]: noise of the Gumbel distribution, the same wherever (seed, step, index) is the same."""
    key = _mix64(_mix64(seed_B) + (step_B.to(torch.int64) + 1) * ODD).view(torch.int32).view(-1, 2)
    index = torch.arange(vocabulary, dtype=torch.int32, device=seed_B.device)
    bits = _mix32(_mix32(index + key[:, :1]) ^ key[:, 1:])
    uniform = (((bits >> 9) & 0x7FFFFF).float() + 0.5) * 2.0**-23  # 23 bits: never 0, never 1
    return -torch.log(-torch.log(uniform))


def _mix32(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * MIX32[0]
    x = (x ^ ((x >> 13) & 0x7FFFF)) * MIX32[1]
    return x ^ ((x >> 16) & 0xFFFF)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * MIX64[0]
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * MIX64[1]
    return x ^ ((x >> 33) & 0x7FFFFFFF)
