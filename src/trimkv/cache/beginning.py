"""What a decode step of fused layers begins with, as one operator: rows of the embedding, rotations, and slots.

A stock decoder spends some twenty launches on that, each longer on its way than at work.

Shapes: B rows, L layers, H KV heads, D head dim, E hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .. import device
from ..linear.products import Normed, norm_input_reference

TOLERANCE = 1e-2  # of rotations, in bf16


@dataclass
class Beginning:
    """How a decoder embeds and rotates: plain rows of a table, and cosines of positions times fixed frequencies."""

    embedding: torch.Tensor  # [V, E]
    frequencies: torch.Tensor  # fp32 [D/2]
    scaling: float  # of cosines and sines

    def step(
        self,
        token_B: torch.Tensor,
        position_B: torch.Tensor,
        real_B: torch.Tensor,
        norm: tuple[torch.Tensor, float],
        seen_LB: torch.Tensor,
        next_slot_LBH: torch.Tensor,
    ) -> tuple[torch.Tensor, Normed, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Begins a step; ``seen_LB`` counts the tokens of real rows.

        Args:
            position_B: by which rows are rotated; may be a row of ``seen_LB``.
            real_B: bool; other rows write nothing.
            norm: weight and eps of the first layer's norm.

        Returns:
            The rows [B, E], the same for the norm, (cosines, sines) [B, D], and (slots, positions) of the new tokens:
            [L, B, H], -1 in rows that are not real, and [B].
        """
        weight, eps = norm
        given = token_B, position_B, real_B, self.embedding, weight, self.frequencies, self.scaling
        x, y, squares, cos, sin, slot, now = torch.ops.trimkv.begin_step(*given, seen_LB, next_slot_LBH)
        return x, Normed(y, squares, eps), (cos, sin), (slot, now)


def begin_reference(token, position, real, embedding, weight, frequencies, scaling, seen, next_slot):
    """``Beginning.step`` in plain torch: the truth, and what runs on the CPU."""
    x = embedding[token]
    cos, sin = rotations(position, frequencies, scaling, x.dtype)
    slot = next_slot.masked_fill(~real[:, None], -1)
    now = seen[0].clone()
    seen += real
    return x, *norm_input_reference(x, weight), cos, sin, slot, now


def rotations(position, frequencies, scaling: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions, [..., D]."""
    angle = position[..., None].float() * frequencies
    angle = torch.cat([angle, angle], -1)
    return (angle.cos() * scaling).to(dtype), (angle.sin() * scaling).to(dtype)


@torch.no_grad()
def recognise_beginning(decoder, head_dim: int) -> Beginning | None:
    """Looks whether a decoder begins like that, with three tokens. Otherwise its own code has to run."""
    embed, rotary = getattr(decoder, "embed_tokens", None), decoder.rotary_emb
    frequencies, scaling = getattr(rotary, "inv_freq", None), getattr(rotary, "attention_scaling", 1.0)
    if type(embed) is not nn.Embedding or embed._forward_hooks or embed._forward_pre_hooks or frequencies is None:
        return None
    if frequencies.shape != (head_dim // 2,) or embed.weight.stride(1) != 1:
        return None
    found = Beginning(embed.weight, frequencies.float(), float(scaling))
    given = []

    def note(module, args, kwargs):
        given.append((args[0] if args else kwargs.get("hidden_states"), kwargs.get("position_embeddings")))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder.layers]
    token = torch.tensor([[1, 2, 3]], device=embed.weight.device) % embed.num_embeddings
    position = torch.tensor([[0, 7, 1000]], device=token.device)
    try:
        decoder(input_ids=token, position_ids=position, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    same = given[0][0] is not None and torch.equal(given[0][0], embed.weight[token])
    expect = rotations(position, found.frequencies, found.scaling, embed.weight.dtype)
    for _, rotation in given:
        if rotation is None or len(rotation) != 2:
            return None
        for one, other in zip(rotation, expect, strict=True):
            same = same and one.shape == other.shape and (one.float() - other.float()).abs().max() < TOLERANCE
    return found if same else None


SCHEMA = (
    "(Tensor token, Tensor position, Tensor real, Tensor embedding, Tensor weight, Tensor frequencies, float scaling, "
    "Tensor(a!) seen, Tensor next_slot) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("trimkv::begin_step", mutates_args=("seen",), schema=SCHEMA)
def _begin_op(*args):
    if device.runs_kernels(args[0]):
        from .beginning_triton import begin

        return begin(*args)
    return begin_reference(*args)


@_begin_op.register_fake
def _begin_fake(token, position, real, embedding, weight, frequencies, scaling, seen, next_slot):
    B, E = token.shape[0], embedding.shape[1]
    rows, turns = (embedding.new_empty(B, n) for n in (E, 2 * len(frequencies)))
    squares = embedding.new_empty(B, 1, dtype=torch.float32)
    return rows, rows.clone(), squares, turns, turns.clone(), next_slot.new_empty(next_slot.shape), seen.new_empty(B)
