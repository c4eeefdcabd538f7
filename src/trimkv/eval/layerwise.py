"""The comparison's fast path: whole sequences in one forward pass, with what every step sees replayed."""

from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicCache

from ..cache.replay import replay_cache
from ..hf.calls import with_cache
from ..hf.model import decoder_of, text_config
from ..hf.substitute import substituted

POSITIONS = 256  # that have logits at a time: a few fp32 tensors [256, V]
TEACHER_BLOCK = 512


def same_rotations(model, length: int) -> bool:
    """Whether a key's rotation does not depend on how long the sequence is when it is made: only then one pass over a
    sequence rotates as its single steps do. LongRoPE and dynamic scaling change beyond the original context."""
    rotary = getattr(decoder_of(model), "rotary_emb", None)
    kinds = getattr(rotary, "rope_type", "default")
    kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
    if not kinds & {"longrope", "dynamic"}:
        return True
    config = rotary.config
    parameters = getattr(config, "rope_parameters", None) or {}
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    return length <= original


def measure(model, ids_NT: torch.Tensor, cells: list, full, batch_size: int, tick: Callable[[], None]) -> None:
    """Adds what each cell (a policy at a budget) and the full model predict for each sequence to their sums.

    Last hidden states of all cells are held for one batch, [cells, B, T, E]; logits only for 256 positions, so that the
    full model's are made once for all cells.

    Args:
        cells: with ``policy``, ``budget``, ``peak``, ``mean`` and ``measure``.
        full: with ``add``; sums of the full model.
        tick: called once per cell and layer with slots, as they are worked off.
    """
    decoder = decoder_of(model)
    for ids_BT in ids_NT.to(model.device).split(batch_size):
        inputs, targets = ids_BT[:, :-1], ids_BT[:, 1:].flatten()
        teacher = DynamicCache(config=text_config(model))
        read = [decoder(input_ids=part, **with_cache(model, teacher)) for part in inputs.split(TEACHER_BLOCK, 1)]
        head = Head(model, type(read[0]))
        hidden = [torch.cat([out.last_hidden_state for out in read], 1).flatten(0, 1)]
        del teacher, read
        for cell in cells:
            cache = replay_cache(model, cell.policy, cell.budget)
            for layer in cache.slot_layers:
                layer.on_attended = tick
            hidden.append(decoder(input_ids=inputs, **with_cache(model, cache)).last_hidden_state.flatten(0, 1))
            cell.peak, cell.mean = max(cell.peak, cache.peak_tokens), max(cell.mean, cache.peak_mean_tokens)
        for start in range(0, len(targets), POSITIONS):
            part = slice(start, start + POSITIONS)
            logits_NV = head(hidden[0][part])
            logp_NV, best_N = full.add(logits_NV, targets[part]), logits_NV.argmax(-1)
            for cell, hidden_NE in zip(cells, hidden[1:], strict=True):
                cell.measure(head(hidden_NE[part]), targets[part], logp_NV, best_N)


class Head:
    """From last hidden states to logits, by the model's own code: what it multiplies or caps is multiplied and capped.

    The model is called with its decoder stood in for by a function that returns the given hidden states.

    Args:
        output: the class of the decoder's output.
    """

    def __init__(self, model, output: type):
        self.model, self.output = model, output

    def __call__(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        def stand_in(*args, **kwargs):
            return self.output(last_hidden_state=hidden_NE[None])

        ids = torch.zeros(1, len(hidden_NE), dtype=torch.long, device=self.model.device)
        with substituted([(decoder_of(self.model), stand_in)]):
            return self.model(input_ids=ids, use_cache=False).logits[0]
