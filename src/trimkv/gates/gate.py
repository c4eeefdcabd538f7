"""The retention gate: how long is each new token worth keeping? Nothing about models."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

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
    """

    def __init__(
        self,
        kind: str,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        intermediate_size: int = 512,
        activation: str = "silu",
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown gate kind {kind!r}; known kinds: {', '.join(KINDS)}")
        self.kind, self.reads_keys = kind, kind != "rg"
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
        """
        if self.reads_keys:
            x = torch.cat(inputs, -1).transpose(1, 2).flatten(2)
        else:
            (x,) = inputs
        if self.kind == "rg3":
            x = x.to(self.gate_proj.weight)
            x, last = self.activation(self.gate_proj(x)) * self.up_proj(x), self.down_proj
        else:
            x, last = self.activation(self.linear1(x.to(self.linear1.weight))), self.linear2
        with torch.autocast(x.device.type, enabled=False):  # mixed-precision training would make it bf16 again
            z = F.linear(x.float(), last.weight.float()) + self.bias.float()
        # logsigmoid(z), spelt so that a decode step's handful of numbers does not wake torch's thread pool on a CPU.
        return -F.softplus(-z).transpose(1, 2)

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
