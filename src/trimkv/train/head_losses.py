"""What heads of baselines learn from: one layer's attention in the frozen model. No T x T tensor is ever whole.

Shapes: B rows, T tokens, H KV heads, G query heads a group, N blocks of a row. A row holds documents one after another
(``start``: where a token's document begins) and perhaps padding; nothing is learnt across documents.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import device
from ..attention.slots import logits

QUERIES = {"cpu": 128, "cuda": 512}  # that have logits at a time: [B, H, G, 512, T]
FUSED_QUERIES = 2048  # that have shares of blocks at a time: [B, Q, 2048, N]


@dataclass
class Documents:
    """Where the documents of a batch lie, shared by all layers.

    Attributes:
        start: int64 [B, T], the index at which a token's document begins.
        real: bool [B, T], False for padding.
        length: int64 [B, T], tokens of a token's document.
    """

    start: torch.Tensor
    real: torch.Tensor
    length: torch.Tensor

    @classmethod
    def of(cls, input_ids: torch.Tensor, start: torch.Tensor | None, mask: torch.Tensor | None) -> "Documents":
        start = torch.zeros_like(input_ids) if start is None else start
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        length = torch.zeros_like(start).scatter_add_(1, start, torch.ones_like(start)).gather(1, start)
        return cls(start, real, length)

    @property
    def position(self) -> torch.Tensor:
        """int64 [B, T], counted from the beginning of a token's document."""
        return torch.arange(self.start.shape[1], device=self.start.device) - self.start

    def late(self, share: float) -> torch.Tensor:
        """bool [B, T]: the tokens in the last ``share`` of their document."""
        return self.real & (self.position >= ((1 - share) * self.length).floor())

    def sees(self, part: slice) -> torch.Tensor:
        """bool [B, t, T]: which keys the queries of a part attend to."""
        index = torch.arange(self.start.shape[1], device=self.start.device)
        return (index <= index[part, None]) & (self.start[:, None, :] == self.start[:, part, None])


def parts(chosen_BT: torch.Tensor, size: int | None = None) -> list[slice]:
    """Blocks of queries, those without a chosen one left out. Waits for the device; once a batch."""
    T, size = chosen_BT.shape[1], size or QUERIES.get(chosen_BT.device.type, QUERIES["cpu"])
    found = F.pad(chosen_BT.any(0), (0, -T % size)).view(-1, size).any(1).tolist()
    return [slice(i * size, min((i + 1) * size, T)) for i, any_there in enumerate(found) if any_there]


def largest_logits(q, k, asks_BtT, scaling, softcap=None) -> torch.Tensor:
    """fp32 [B, H, T]: the largest logit of each key with the queries of its group that ask; -inf where none does."""
    x = logits(q, k, scaling, softcap)
    return x.masked_fill_(~asks_BtT[:, None, None], float("-inf")).amax((2, 3))


def largest_shares(q, k, sees_BtT, scaling, softcap=None, s_aux=None) -> torch.Tensor:
    """fp32 [B, H, t, T]: the largest probability that a query head of the group gives to each key."""
    x = logits(q, k, scaling, softcap).masked_fill_(~sees_BtT[:, None, None], float("-inf"))
    lse = x.logsumexp(-1, keepdim=True)
    if s_aux is not None:
        lse = torch.logaddexp(lse, s_aux.float().view(1, x.shape[1], -1, 1, 1))
    return x.sub_(lse).exp_().amax(2)


@functools.cache
def compiled(function):
    """The function as one or two kernels instead of ten, for blocks of one size."""
    return torch.compile(function, dynamic=False)


@dataclass
class LocretTask:
    """LocRet's regression (arXiv 2410.01805, section 3; locret/train): what a key's largest logit with the queries of
    the answer will be.

    A text without question and answer is split: the queries in the last ``share`` of a document stand for the answer,
    the tokens before them for the prompt. Only prompt tokens have a target, the largest scaled logit before the softmax
    over those queries and the query heads of the group, of rotated queries and keys in every architecture.

    Args:
        share: of a document whose queries ask.
        smoothness: weight of the squared difference between neighbours, summed over layers.
        compile: whether to compile what reads the logits.
    """

    documents: Documents
    share: float = 0.25
    smoothness: float = 0.0025
    compile: bool = False

    def __post_init__(self):
        self.answer = self.documents.late(self.share)
        self.parts = parts(self.answer)
        self.prompt = self.documents.real & ~self.answer

    @torch.no_grad()
    def target(self, q, k, scaling, softcap=None) -> torch.Tensor:
        """fp32 [B, H, T]; -inf where nothing asks."""
        target = torch.full(k.shape[:3], float("-inf"), device=k.device)
        largest = compiled(largest_logits) if self.compile else largest_logits
        for part in self.parts:
            asks = self.answer[:, part, None] & self.documents.sees(part) & self.prompt[:, None]
            target = torch.maximum(target, largest(q[:, :, part], k, asks, scaling, softcap))
        return target

    def losses(self, scores: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """regression: SmoothL1, a mean over tokens and heads; smoothness: a mean over neighbours and heads."""
        asked = target > float("-inf")
        gap = F.smooth_l1_loss(scores, target.where(asked, scores.detach()), reduction="sum")
        start = self.documents.start
        neighbours = (self.prompt[:, 1:] & self.prompt[:, :-1] & (start[:, 1:] == start[:, :-1]))[:, None]
        steps = (scores.diff(dim=-1) ** 2 * neighbours).sum()
        H = scores.shape[1]
        return {
            "regression": gap / asked.sum().clamp_min(1),
            "smoothness": steps / (H * neighbours.sum()).clamp_min(1),
        }


@dataclass
class SeerTask:
    """SeerAttention-R's distillation (arXiv 2506.08889, section 3.2; decode_sparse/qwen3/*_training.py): which share of
    attention each block of keys receives.

    The target of a query and KV head is the largest probability within each block, the largest over the group's query
    heads, made to sum to one. The loss is 10 times the mean, over the queries in the last ``share`` of their documents,
    over heads and over blocks, of the terms of KL(target || softmax of the gate's logits).

    Args:
        block_size: tokens per block; a document's first block begins with it.
        share: of a document whose queries count.
        compile: whether to compile what reads the logits, where they are not left to the kernel.
        implementation: of the target: "torch", "triton", or "auto", triton where it can.
    """

    documents: Documents
    block_size: int
    share: float = 0.5
    weight: float = 10.0
    compile: bool = False
    implementation: str = "auto"

    def __post_init__(self):
        documents = self.documents
        self.rows = documents.late(self.share)
        first = (documents.position % self.block_size == 0) & documents.real
        self.block = (first.cumsum(1) - 1).clamp_min(0)  # [B, T]
        N = int(first.sum(1).max())
        index = torch.arange(first.shape[1], device=first.device).expand_as(first)
        far = torch.full((first.shape[0], N), first.shape[1], device=first.device)
        self.index = far.scatter_reduce(1, self.block, index.where(first, first.shape[1]), "amin")  # T where no block
        inside = self.index.clamp_max(first.shape[1] - 1)
        self.start = documents.start.gather(1, inside)
        self.begin = self.index - self.start  # positions in their documents
        self.tokens = torch.zeros_like(far).scatter_add(1, self.block, documents.real.long())
        members = inside[..., None] + torch.arange(self.block_size, device=first.device)  # [B, N, block_size]
        self.members = members.clamp_max(first.shape[1] - 1)
        there = torch.arange(self.block_size, device=first.device) < self.tokens[..., None]
        self.there = there & (self.index < first.shape[1])[..., None]
        self.places = self.members.where(self.there, first.shape[1]).int(), documents.start.int(), self.block.int()

    @functools.cached_property
    def parts(self) -> list[slice]:
        return parts(self.rows)

    @functools.cached_property
    def fused_parts(self) -> list[slice]:
        return parts(self.rows, FUSED_QUERIES)

    @torch.no_grad()
    def pooled(self, k: torch.Tensor) -> torch.Tensor:
        """fp32 [B, H, N, 3 D]: largest, smallest and mean coordinates of the keys in each block."""
        x, there = self.in_blocks(k.float()), self.there[:, None, :, :, None]
        high = x.masked_fill(~there, float("-inf")).amax(3)
        low = x.masked_fill(~there, float("inf")).amin(3)
        mean = x.masked_fill(~there, 0.0).sum(3) / self.tokens[:, None, :, None].clamp_min(1)
        pooled = torch.cat([high, low, mean], -1)
        return pooled.masked_fill(self.tokens[:, None, :, None] == 0, 0.0)

    @torch.no_grad()
    def _largest(self, part: slice, q, k, scaling, softcap=None, s_aux=None) -> torch.Tensor:
        """The largest probability in each block, fp32 [B, H, t, N]."""
        largest = compiled(largest_shares) if self.compile else largest_shares
        x = largest(q[:, :, part], k, self.documents.sees(part), scaling, softcap, s_aux)
        members = self.members.flatten(1)[:, None, None].expand(*x.shape[:3], -1)
        best = x.gather(3, members).unflatten(3, self.members.shape[1:])
        return best.masked_fill_(~self.there[:, None, None], 0.0).amax(-1)

    @torch.no_grad()
    def _largest_fused(self, part: slice, q, k_blocks, scaling, softcap=None, s_aux=None) -> torch.Tensor:
        """The same from keys that lie block after block, [B, H, N, block_size, D]."""
        from . import head_losses_triton

        best = head_losses_triton.block_shares(q, part, k_blocks, *self.places, scaling, softcap, s_aux)
        return best.unflatten(1, (k_blocks.shape[1], -1)).amax(2)

    def in_blocks(self, k: torch.Tensor) -> torch.Tensor:
        """The keys block after block, [B, H, N, block_size, D]; anything where a block has no such token."""
        members = self.members.flatten(1)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        return k.gather(2, members).unflatten(2, self.members.shape[1:])

    def _problem(self, q: torch.Tensor) -> str | None:
        """Why the kernel cannot do it, or is not to."""
        if self.implementation == "torch":
            return "torch is asked for"
        if not device.has_triton():
            return "Triton is not installed"
        from . import head_losses_triton

        return head_losses_triton.unsupported(q, self.block_size)

    def visible(self, part: slice) -> torch.Tensor:
        """bool [B, t, N]: blocks of a query's document that began before it."""
        index = torch.arange(self.rows.shape[1], device=self.rows.device)[part, None]
        return (self.index[:, None] <= index) & (self.start[:, None] == self.documents.start[:, part, None])

    def losses(self, gate, q, k, q_plain, k_plain, scaling, softcap=None, s_aux=None) -> dict[str, torch.Tensor]:
        """distillation, and kl: the sum over blocks, a mean over queries and heads.

        Args:
            q, k: rotated; q_plain, k_plain: before rotation.

        Raises:
            ValueError: the kernel is asked for by name and cannot do this.
        """
        problem = self._problem(q)
        if problem is not None and self.implementation == "triton":
            raise ValueError(f'{problem}: use implementation="torch"')
        fused = problem is None
        largest, keys = (self._largest_fused, self.in_blocks(k)) if fused else (self._largest, k)
        summary = gate.summary(self.pooled(k_plain), self.begin)
        total = summary.new_zeros(())
        for part in self.fused_parts if fused else self.parts:
            target = largest(part, q, keys, scaling, softcap, s_aux)
            target = target / target.sum(-1, keepdim=True).clamp_min(1e-9)
            query = gate.query(q_plain[:, :, part], self.documents.position[:, part])
            visible = self.visible(part)[:, None]
            logp = gate.logits(query, summary).masked_fill(~visible, -1e20).log_softmax(-1)
            terms = torch.xlogy(target, target) - target * logp.where(visible, 0.0)
            total = total + (terms.sum(-1) * self.rows[:, None, part]).sum()
        kl = total / (self.rows.sum() * k.shape[1]).clamp_min(1)
        return {"distillation": self.weight * kl / self.index.shape[1], "kl": kl}
