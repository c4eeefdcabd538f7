"""The retention gate: how long is each new token worth keeping? Nothing about models."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from ..ranks import Part

KINDS = ("rg", "rg2", "rg3")


class RetentionGate(nn.Module):
    """A small MLP shared by the KV heads of a layer that gives log beta, the log retention of each token and head.

    Kinds (arXiv 2512.03324, section 4; parameter names as in the published checkpoints):
        rg: reads the layer's hidden states (after the input norm, as q, k and v do).
        rg2: reads the rotated key and the value of all heads.
        rg3: as rg2, with a gated MLP and no linear biases.

    The last matrix product, the output bias and the logsigmoid are fp32 whatever the model's dtype: near an output bias
    of 18 the bf16 grid is 0.125 wide, and evictions would be decided by ties.

    Args:
        kind: one of KINDS.
        hidden_size: E, for rg.
        num_heads, head_dim: H and D of keys and values.
        intermediate_size: I, width of the MLP.
        activation: name of the base model's activation.
        part: which of the KV heads this gate serves, where a model is sharded by heads; None for all. Its parameters
            are then a part of a gate's too (``local``): the last matrix and the output bias have the rows of its heads;
            for rg2 and rg3, which read keys and values, the first matrix has their columns, and the processes add up
            what each makes of its own.
    """

    def __init__(
        self,
        kind: str,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        intermediate_size: int = 512,
        activation: str = "silu",
        part: Part | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown gate kind {kind!r}; known kinds: {', '.join(KINDS)}")
        self.kind, self.reads_keys = kind, kind != "rg"
        self.part = Part(0, num_heads, num_heads) if part is None else part
        self.share = 1.0  # of the mean number of slots per head, what this layer's heads should have
        num_heads = self.part.num
        inputs = 2 * head_dim * num_heads if self.reads_keys else hidden_size
        if kind == "rg3":
            self.gate_proj = nn.Linear(inputs, intermediate_size, bias=False)
            self.up_proj = nn.Linear(inputs, intermediate_size, bias=False)
            self.down_proj = nn.Linear(intermediate_size, num_heads, bias=False)
        else:
            self.linear1 = nn.Linear(inputs, intermediate_size)
            self.linear2 = nn.Linear(intermediate_size, num_heads, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_heads))
        self.activation = ACT2FN[activation]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """log beta, fp32 [B, H, T], at most 0.

        Args:
            inputs: hidden states [B, T, E] for rg; rotated keys and values [B, H, T, D] each for rg2 and rg3.
                H are the heads of this process.
        """
        if self.reads_keys:
            x = torch.cat(inputs, -1).transpose(1, 2).flatten(2)
        else:
            (x,) = inputs
        if self.kind == "rg3":
            x = x.to(self.gate_proj.weight)
            gate, up = self._first(x, self.gate_proj, self.up_proj)
            x, last = self.activation(gate) * up, self.down_proj
        else:
            (x,) = self._first(x.to(self.linear1.weight), self.linear1)
            x, last = self.activation(x), self.linear2
        with torch.autocast(x.device.type, enabled=False):  # mixed-precision training would make it bf16 again
            z = F.linear(x.float(), last.weight.float()) + self.bias.float()
        # logsigmoid(z), spelt so that a decode step's handful of numbers does not wake torch's thread pool on a CPU.
        return -F.softplus(-z).transpose(1, 2)

    @property
    def sums(self) -> bool:
        """Whether processes have to add up what they make of their heads' keys and values."""
        return self.reads_keys and not self.part.whole

    def _first(self, x: torch.Tensor, *linears: nn.Linear) -> list[torch.Tensor]:
        """The first matrix products."""
        if not self.sums:
            return [linear(x) for linear in linears]
        mine = torch.cat([F.linear(x, linear.weight).float() for linear in linears], -1)
        parts = self.part.ranks.sum(mine).chunk(len(linears), -1)
        return [
            y.to(x.dtype) if linear.bias is None else y.to(x.dtype) + linear.bias
            for y, linear in zip(parts, linears, strict=True)
        ]

    def local(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """What this gate has of a parameter of a gate for all heads."""
        if name in ("linear2.weight", "down_proj.weight", "bias"):
            return self.part.slice(parameter)
        if self.reads_keys and name in ("linear1.weight", "gate_proj.weight", "up_proj.weight"):
            return self.part.slice(parameter, 1)
        return parameter

    def initialise(self, training_length: int, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Fresh weights for training on sequences of ``training_length`` tokens."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name == "bias":
                    parameter.fill_(output_bias(training_length))
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def output_bias(training_length: int, survival: float = 0.6) -> float:
    """The output bias at which a token's worth falls to ``survival`` over one training sequence.

    Too high a bias saturates the sigmoid and its gradient drowns in the optimizer's epsilon, too low a one forgets
    everything at once; survival between 0.4 and 0.9 trains.
    """
    log_beta = math.log(survival) / training_length
    return log_beta - math.log(-math.expm1(log_beta))
