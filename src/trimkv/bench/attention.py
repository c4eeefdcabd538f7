"""What the attention of one layer costs at a decode step, alone: no model, no host."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..attention import reference, slots
from ..cache import fused
from .measure import Wrong, replayed, row
from .models import config_of

SYSTEMS = ("sdpa", "trimkv")
ROTATED = 160e6  # bytes of different stores that are gone through, more than a cache holds
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass
class Options:
    """What is measured: layers of ``shape``, for each of ``batches`` rows with ``budget`` slots per head."""

    shape: str
    batches: tuple[int, ...]
    budgets: tuple[int, ...]
    systems: tuple[str, ...] = SYSTEMS
    repeat: int = 20


@torch.no_grad()
def measure(options: Options, device: torch.device, dtype: torch.dtype, bandwidth: float) -> Iterator[dict]:
    """A row for each batch, budget and system: ms of one step of one layer. ``trimkv`` writes, attends and finds the
    next slot, ``sdpa`` only attends. Rows say how many bytes move in a call."""
    torch.manual_seed(0)
    for batch, budget in itertools.product(options.batches, options.budgets):
        for system in options.systems:

            def one(system=system, batch=batch, budget=budget) -> dict:
                first = decode_step(options.shape, batch, budget, device, dtype)
                moved = sum(t.nbytes for t in first.values() if isinstance(t, torch.Tensor))
                copies = max(1, int(ROTATED / moved)) if device.type == "cuda" else 1
                given = [first, *(decode_step(options.shape, batch, budget, device, dtype) for _ in range(copies))]
                error = _error(system, given[0])
                if error > TOLERANCE[dtype]:
                    raise Wrong(f"output differs by {error:.2g} (relative)")
                calls = [lambda one=one: _call(system, one) for one in given]
                ms = replayed(calls, device, options.repeat)
                floor = moved / bandwidth * 1e3
                return {"ms": ms, "tokens_per_second": batch / ms * 1e3, "floor_ms": floor, "moved_bytes": moved}

            yield row(system, {"context": budget, "batch": batch, "budget": budget}, one, device)


def decode_step(shape: str, B: int, M: int, device: torch.device, dtype: torch.dtype) -> dict:
    """A decode step over full slots, by the names of ``slots_triton.decode``."""
    config = config_of(shape)
    Q, H = config.num_attention_heads, config.num_key_value_heads
    D = getattr(config, "head_dim", None) or config.hidden_size // Q

    def normal(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    return {
        "q": normal(B, Q, D),
        "k_new": normal(B, H, D),
        "v_new": normal(B, H, D),
        "k": normal(B, H, M, D),
        "v": normal(B, H, M, D),
        "position": torch.arange(M, dtype=torch.int32, device=device).expand(B, H, M).contiguous(),
        "slot": torch.randint(M, (B, H), device=device, dtype=torch.int32),
        "now": torch.full((B,), M, dtype=torch.int32, device=device),
        "scaling": D**-0.5,
        "log_beta_new": -torch.rand(B, H, device=device) * 0.01,
        "log_beta": -torch.rand(B, H, M, device=device) * 0.01,
    }


def _call(system: str, given: dict) -> torch.Tensor:
    if system == "sdpa":
        B, Q, D = given["q"].shape
        H = given["k"].shape[1]
        q = given["q"].view(B, H, Q // H, D)
        return F.scaled_dot_product_attention(q, given["k"], given["v"], scale=given["scaling"]).reshape(B, Q, D)
    kernels = fused.kernels(given["q"], given["k"], given["v"])
    if kernels is not None:
        return kernels.decode(*given.values()).out
    return _plain(**given)


def _plain(q, k_new, v_new, k, v, position, slot, now, scaling, log_beta_new, log_beta) -> torch.Tensor:
    """What the cache does where there are no kernels."""
    index = slot.long()[..., None]
    k.scatter_(2, index[..., None].expand(-1, -1, 1, k.shape[-1]), k_new[:, :, None])
    v.scatter_(2, index[..., None].expand(-1, -1, 1, v.shape[-1]), v_new[:, :, None])
    position.scatter_(2, index, now[:, None, None].expand_as(index))
    log_beta.scatter_(2, index, log_beta_new[..., None])
    slots.victim(log_beta * (now[:, None, None] + 1 - position), position)
    return slots.attend(q[:, :, None], k, v, None, scaling)[:, :, 0]


def _error(system: str, given: dict) -> float:
    """Against the reference in fp32, over the store as it must be."""
    given = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    k, v, position = given["k"].float(), given["v"].float(), given["position"].clone()
    if system != "sdpa":
        index = given["slot"].long()[..., None]
        at = index[..., None].expand(-1, -1, 1, k.shape[-1])
        k.scatter_(2, at, given["k_new"].float()[:, :, None])
        v.scatter_(2, at, given["v_new"].float()[:, :, None])
        position.scatter_(2, index, given["now"][:, None, None].expand_as(index))
    q, now = given["q"].float()[:, :, None], given["now"][:, None]
    truth = reference.slot_attention(q, k, v, now, position, given["scaling"])[:, :, 0]
    return reference.relative_error(_call(system, given), truth)
