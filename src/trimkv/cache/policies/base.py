"""What a policy is."""

import torch

from ..slots import Slots


class Policy:
    """Says what each token in the slots is worth. The lowest score is overwritten first.

    A policy is this class with a ``score``; storage, protection of sinks and recent tokens, tie-breaking, accounting
    and kernels are the same for all. A policy object holds no per-sequence state: what it must remember about a token
    it names in ``state`` and gives in ``new_state``, and the slot store carries it along with the token.

    Class attributes:
        name: as on the command line.
        needs: what a score is made of: any of "log_beta" (trained gates), "keys".
        trained: whether it needs trained weights.
        source: paper section or repository commit.
        bounded: False keeps every token.
        sinks: first tokens that the method itself never evicts.
        state: name -> dtype of what it stores per token beside key, value and position.
    """

    name: str
    needs: frozenset[str] = frozenset()
    trained = False
    source = ""
    bounded = True
    sinks = 0
    state: dict[str, torch.dtype] = {}

    def new_state(self, new: Slots, log_beta_BHT: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What to remember about T new tokens, at their creation: name -> [B, H, T]."""
        return {}

    def score(self, slots: Slots, now_B11: torch.Tensor) -> torch.Tensor:
        """fp32 [B, H, S], higher = keep.

        Args:
            slots: the candidates; empty ones may score anything.
            now_B11: int32 [B, 1, 1], the position of the query that is served next.
        """
        raise NotImplementedError
