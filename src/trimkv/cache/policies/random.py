import torch

from .base import Policy

# Odd constants of the splitmix64 finaliser (Steele et al., OOPSLA 2014), as signed 64-bit numbers.
_MIX_1, _MIX_2, _GOLDEN = -4658895280553007687, -7723592293110705685, -7046029254386353131


def _int64(x: int) -> int:
    """A Python number with int64's wrap-around."""
    return (x + 2**63) % 2**64 - 2**63


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


class Random(Policy):
    """Evicts a token drawn uniformly from those held: the floor that a method has to beat.

    Scores are a hash of (seed, layer, head, position, now), not draws from a generator: a row of a batch evicts
    what its single run evicts, and a restored snapshot continues as the original would.
    """

    name = "random"
    source = "control"
    formula = "hash(seed, layer, head, position, now)"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def score(self, slots, now_B11):
        head = torch.arange(slots.position.shape[1], device=slots.position.device)[None, :, None]
        head = head + slots.layer.first_head
        x = _mix(slots.position.to(torch.int64) + _int64(_GOLDEN * (self.seed + 1)))
        x = _mix(x + _GOLDEN * (head + slots.layer.idx * 65537 + 1))
        x = _mix(x + _GOLDEN * now_B11.to(torch.int64))
        return (x & 0xFFFFFF).float()
