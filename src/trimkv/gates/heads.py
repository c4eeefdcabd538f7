"""The trained parts of two baselines, LocRet's retaining head and SeerAttention-R's block gate."""

import math
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN


@dataclass
class Heard:
    """What one call of an attention module has told its retaining head; calls in other threads have their own.

    Attributes:
        head: whose call it is.
        projections: those that have come, by number.
        inputs: all of them, once they are there, [B, T, inputs].
        scores: made of the inputs and not taken yet, [B, H, T].
    """

    head: "RetainingHead"
    projections: dict[int, torch.Tensor] = field(default_factory=dict)
    inputs: torch.Tensor | None = None
    scores: torch.Tensor | None = None


_heard: ContextVar[Heard | None] = ContextVar("what the retaining head of the running call heard", default=None)


class RetainingHead(nn.Module):
    """LocRet's head (arXiv 2410.01805, section 3; huangyuxiang03/Locret@28995c5): an MLP over a token's query, key and
    value projections before rotation, shared by the KV heads of a layer. One raw number per token and KV head says how
    large the token's largest logit with later queries will be. Higher = keep.

    The last product is fp32, and so is the score, whatever the model's dtype.

    Args:
        inputs: (Q + 2 H) D, the width of the projections together.
        num_heads: H.
        intermediate_size: I, 1024 as published.
        activation: name of the base model's activation.
    """

    kind = "locret"

    def __init__(self, inputs: int, num_heads: int, intermediate_size: int = 1024, activation: str = "silu"):
        super().__init__()
        self.fc1 = nn.Linear(inputs, intermediate_size, bias=False)
        self.fc2 = nn.Linear(intermediate_size, num_heads, bias=False)
        self.activation = ACT2FN[activation]

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """Scores, fp32 [B, H, T], of projections [B, T, inputs]."""
        x = self.activation(self.fc1(x_BTI.to(self.fc1.weight)))
        return F.linear(x.float(), self.fc2.weight.float()).transpose(1, 2)

    def begin(self, wanted: bool) -> None:
        """Begins a call of the attention module: its projections are heard if somebody wants scores."""
        _heard.set(Heard(self) if wanted or self.training else None)

    def hear(self, place: int, of: int, projection: torch.Tensor) -> None:
        """Takes projection number ``place`` of the running call; when all ``of`` are there, they are the inputs."""
        call = _heard.get()
        if call is not None and call.head is self:
            call.projections[place] = projection
            if len(call.projections) == of:
                call.inputs, call.projections = torch.cat([call.projections[i] for i in range(of)], -1), {}

    def take(self, tokens: int) -> torch.Tensor:
        """Scores of the next ``tokens`` tokens of the running call, fp32 [B, H, tokens]."""
        call = _heard.get()
        assert call is not None and call.head is self, "the projections were not heard"
        if call.inputs is not None:
            call.scores, call.inputs = self(call.inputs), None
        assert call.scores is not None and call.scores.shape[2] >= tokens, "the projections were not heard"
        part, rest = call.scores[:, :, :tokens], call.scores[:, :, tokens:]
        call.scores = rest if rest.shape[2] else None  # a view of nothing would hold on to a whole prompt's scores
        return part

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights, as nn.Linear's."""
        with torch.no_grad():
            for layer in (self.fc1, self.fc2):
                layer.weight.copy_(_uniform(layer.weight.shape, layer.in_features**-0.5, generator))


class BlockGate(nn.Module):
    """SeerAttention-R's gate (arXiv 2506.08889, section 3; microsoft/SeerAttention@aba03e3 decode_sparse): how much
    attention will a query give to each block of keys?

    Query and keys enter as they are before rotation. The query heads of a group are projected and summed; a block's
    keys are pooled (max, min, mean) and projected; both are normalised and turned by the gate's own rotation, a block
    by the position at which it begins. Everything is fp32. Parameter names are the published ones.

    Args:
        num_heads, group, head_dim: H, G and D of the model.
        width: of the gate's queries and summaries; 128 as published, for heads of 128.
        block_size: tokens per block; 64 as published.
        rope_theta: of the gate's rotation, the model's.
    """

    kind = "seer_attention_r"

    def __init__(
        self,
        num_heads: int,
        group: int,
        head_dim: int,
        width: int = 128,
        block_size: int = 64,
        rope_theta: float = 10000.0,
    ):
        super().__init__()
        if width % 2:
            raise ValueError(f"the width of a block gate must be even, got {width}")
        self.width, self.block_size, self.rope_theta = width, block_size, rope_theta
        self.attngate_linear_q = _Weight(num_heads, group, head_dim, width)
        self.attngate_linear_k = _Weight(num_heads, 3 * head_dim, width)
        self.attngate_qnorm, self.attngate_knorm = _Weight(width), _Weight(width)
        self.initialise()

    def query(self, q_BQTD: torch.Tensor, position_BT: torch.Tensor) -> torch.Tensor:
        """The gate's queries, fp32 [B, H, T, width], from queries before rotation."""
        weight = self.attngate_linear_q.weight.float()
        B, _, T, D = q_BQTD.shape
        x = q_BQTD.reshape(B, *weight.shape[:2], T, D).float()
        x = torch.einsum("bhgtd,hgdw->bhtw", x, weight)
        return self._turn(self._normalise(x, self.attngate_qnorm), position_BT)

    def summary(self, pooled_BHNP: torch.Tensor, begin_BN: torch.Tensor) -> torch.Tensor:
        """Summaries of blocks, fp32 [B, H, N, width].

        Args:
            pooled_BHNP: largest, smallest and mean coordinates of the block's keys before rotation, P = 3 D.
            begin_BN: positions of the blocks' first tokens.
        """
        x = torch.einsum("bhnp,hpw->bhnw", pooled_BHNP.float(), self.attngate_linear_k.weight.float())
        return self._turn(self._normalise(x, self.attngate_knorm), begin_BN)

    def logits(self, query_BHTW: torch.Tensor, summary_BHNW: torch.Tensor) -> torch.Tensor:
        """fp32 [B, H, T, N]; a softmax over blocks makes shares of attention of them."""
        return query_BHTW @ summary_BHNW.transpose(2, 3) * self.width**-0.5

    def initialise(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Fresh weights, as the published training's."""
        with torch.no_grad():
            for part in (self.attngate_linear_q, self.attngate_linear_k):
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator) * std)
            for part in (self.attngate_qnorm, self.attngate_knorm):
                part.weight.fill_(1.0)

    def _normalise(self, x: torch.Tensor, norm: "_Weight") -> torch.Tensor:
        return F.rms_norm(x, (self.width,), norm.weight.float(), 1e-6)

    def _turn(self, x_BHTW: torch.Tensor, position_BT: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        exponent = torch.arange(half, dtype=torch.float32, device=x_BHTW.device) * (-math.log(self.rope_theta) / half)
        angle = position_BT[:, None, :, None].float() * exponent.exp()
        cos, sin = angle.cos(), angle.sin()
        first, second = x_BHTW[..., :half], x_BHTW[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class _Weight(nn.Module):
    """A parameter by the name ``weight``."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))


def _uniform(shape, bound: float, generator: torch.Generator | None) -> torch.Tensor:
    return (2 * torch.rand(shape, generator=generator) - 1) * bound
