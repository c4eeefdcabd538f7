"""Tensor parallel: several processes hold a model together, each some of its heads; transformers' tp_plan shards it."""

import re
from dataclasses import dataclass

import torch

GATHERED = (None, "colwise_gather_output", "colwise_rep")  # styles after which every process has all of the output
PROJECTIONS = ("q_proj", "k_proj", "qkv_proj")


@dataclass(frozen=True)
class Ranks:
    """The processes that hold a model together.

    Attributes:
        number: of this one, from 0. count: how many there are.
        group: their torch.distributed process group.
    """

    number: int
    count: int
    group: object

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Adds up what the processes have, in place: the same bits in all of them."""
        torch.distributed.all_reduce(x, group=self.group)
        return x

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over processes, in place."""
        return self.sum(x).div_(self.count)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """What the first process has, in place."""
        torch.distributed.broadcast(x, group=self.group, group_src=0)
        return x


@dataclass(frozen=True)
class Part:
    """The KV heads of one attention module that this process has: ``first`` to ``first + num - 1`` of ``of``.

    Attributes:
        ranks: the processes that have the others; None where all heads are here.
    """

    first: int
    num: int
    of: int
    ranks: Ranks | None = None

    @property
    def whole(self) -> bool:
        """Whether all heads are here."""
        return self.num == self.of

    def slice(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This process's heads of a tensor that has all of them along ``dim``, in ``of`` equal pieces."""
        piece = x.shape[dim] // self.of
        return x.narrow(dim, self.first * piece, self.num * piece)


def ranks_of(model) -> Ranks | None:
    """The processes among which a model is sharded; None where it is whole."""
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    mesh = model._device_mesh
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    return Ranks(mesh.get_local_rank(), mesh.size(), mesh.get_group())


def part_of(model, module, heads: int) -> Part:
    """Which of an attention module's KV heads are here.

    Args:
        heads: KV heads of the whole module.

    Raises:
        ValueError: heads that cannot be shared out evenly, or a plan that shards them in another way than by head.
    """
    ranks = ranks_of(model)
    styles = _styles(model, module) if ranks is not None else set()
    if styles <= set(GATHERED):
        return Part(0, heads, heads)
    name = type(model).__name__
    if styles != {"colwise"}:
        raise ValueError(f"{name} is sharded by {', '.join(map(str, sorted(styles, key=str)))}; slots need colwise")
    if heads % ranks.count:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"{name} has {heads} KV heads, which cannot be shared out over {ranks.count} processes; "
            f"a number of processes that fits is {fitting}"
        )
    num = heads // ranks.count
    return Part(ranks.number * num, num, heads, ranks)


def sharded(module: torch.nn.Module) -> bool:
    """Whether other processes have parts of a module's parameters."""
    return any(hasattr(parameter, "to_local") for parameter in module.parameters())


def local_nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in this process, whether it is sharded or not."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def _styles(model, module) -> set:
    """How the plan shards the projections of an attention module that make queries and keys."""
    name = next(name for name, other in model.named_modules() if other is module)
    name = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    return {model.tp_plan.get(f"{name}.{part}") for part in PROJECTIONS if hasattr(module, part)}
