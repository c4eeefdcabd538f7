"""How a layer turns keys and queries by their position, for policies that must turn them otherwise."""

import sys
from dataclasses import dataclass

import torch

from ..hf.model import decoder_of


@dataclass
class Rotation:
    """Rotary embedding of a layer: pair i of a vector is turned by position * frequency[i].

    Attributes:
        frequency: fp32 [R / 2]; the first R dimensions are turned, the rest pass.
        interleaved: pairs are (0, 1), (2, 3), ... and not (0, R/2), (1, R/2 + 1), ...
    """

    frequency: torch.Tensor
    interleaved: bool = False

    def turn(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Vectors [..., D], each turned by ``by`` [...] positions (of any sign), in fp32; in the dtype of x."""
        angle = by[..., None].float() * self.frequency.to(x.device)
        return self.turn_by(x, angle.cos(), angle.sin())

    def turn_by(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Vectors [..., D] turned by one angle a pair, given as cosine and sine, [..., R / 2]."""
        first, second = self.pairs(x.float())
        turned = first * cos - second * sin, second * cos + first * sin
        return torch.cat([self.join(*turned).to(x.dtype), x[..., 2 * len(self.frequency) :]], -1)

    def pairs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two coordinates of each pair, both [..., R / 2]."""
        half = len(self.frequency)
        if self.interleaved:
            return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        return x[..., :half], x[..., half : 2 * half]

    def join(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The inverse of ``pairs``: [..., R]."""
        return torch.stack([first, second], -1).flatten(-2) if self.interleaved else torch.cat([first, second], -1)


def rotation_of(model, module) -> Rotation:
    """The rotation of an attention module, checked against the model's own code.

    Raises:
        ValueError: a model that rotates otherwise, or by frequencies that depend on the length of the sequence.
    """
    name = type(model).__name__
    rotary = getattr(decoder_of(model), "rotary_emb", None)
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    kind = getattr(module, "layer_type", None)
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    frequency = getattr(rotary, f"{prefix}inv_freq", None)
    if apply is None or frequency is None:
        raise ValueError(f"{name} does not rotate its keys in a way that is known here; choose another policy")
    types = getattr(rotary, "rope_type", "default")
    if (types[kind] if isinstance(types, dict) else types) in ("longrope", "dynamic"):
        raise ValueError(f"{name} rotates by frequencies that depend on the length; choose another policy")
    rotation = Rotation(frequency.float())
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 2, 2 * len(frequency), generator=g).to(frequency.device)
    there = torch.tensor([[0, 3]], device=frequency.device)
    try:
        theirs = _turned_by(rotary, apply, x, there, kind if prefix else None)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} does not rotate its keys in a way that is known here: {error}") from None
    scale = getattr(rotary, f"{prefix}attention_scaling", 1.0)
    for rotation.interleaved in (False, True):
        if torch.allclose(rotation.turn(x, there[:, None]) * scale, theirs.float(), atol=1e-2):
            return rotation
    raise ValueError(f"{name} does not rotate its keys in a way that is known here; choose another policy")


def _turned_by(rotary, apply, x: torch.Tensor, there: torch.Tensor, kind: str | None) -> torch.Tensor:
    """x at positions ``there`` [1, T], by the model's own code. With mrope a position has several axes, which are equal
    in text (3 for time, height and width)."""
    given = () if kind is None else (kind,)
    try:
        cos, sin = rotary(x, there, *given)
    except IndexError:
        cos, sin = rotary(x, there.expand(3, *there.shape), *given)
    try:
        return apply(x, x, cos, sin)[0]
    except TypeError:  # Gemma 4 turns queries and keys one by one
        return apply(x, cos, sin)
