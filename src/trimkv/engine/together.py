"""Several processes that hold a model together make the same steps: before each, the first one says what is in it."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist

from ..ranks import Ranks

MOST_CANCELLED = 60  # told in one step; the others wait for the next


@dataclass(frozen=True)
class Step:
    """What is in a step besides going on.

    Attributes:
        known: requests of smaller numbers may be begun.
        cancelled: numbers of requests that end here.
        interrupted: whether Ctrl-C was pressed.
        closed: whether this is the end.
    """

    known: int
    cancelled: tuple[int, ...] = ()
    interrupted: bool = False
    closed: bool = False


class Together:
    """The word of the first process. It travels from memory to memory of hosts, so that no device is waited for."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.leads = ranks, ranks.number == 0
        self.group = _between_hosts(ranks.group)

    def agree(self, own: Step) -> Step:
        """What the first process says. All processes call this equally often."""
        cancelled = own.cancelled[:MOST_CANCELLED]
        words = [own.known, own.interrupted, own.closed, len(cancelled), *cancelled]
        message = torch.zeros(4 + MOST_CANCELLED, dtype=torch.int64)
        message[: len(words)] = torch.tensor([int(word) for word in words])
        dist.broadcast(message, group=self.group, group_src=0)
        known, interrupted, closed, num, *ids = message.tolist()
        return Step(known, tuple(ids[:num]), bool(interrupted), bool(closed))


@cache
def _between_hosts(group) -> object:
    """A gloo group of the same processes, made once: a second one would find the addresses of the first."""
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)
