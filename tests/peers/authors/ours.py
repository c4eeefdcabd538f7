"""What our published names make of the same cases as generations.py."""

from importlib import import_module
from pathlib import Path

import torch

from peers.authors import checkpoints
from peers.authors.cases import NEW, PACKAGE, Case


def load(case: Case, folder: Path, dtype: torch.dtype = torch.float32):
    """The model, and the checksum of its weights where they had to be written first (else None)."""
    digest = None if folder.exists() else checkpoints.write(folder, case.model, case.gate, case.seed)
    cls = getattr(import_module(f"trimkv.models.{case.model}"), f"TrimKV{checkpoints.CLASSES[case.model]}")
    return cls.from_pretrained(folder / "gates", download_from="local", torch_dtype=dtype).eval(), digest


def new_cache(case: Case, model):
    from trimkv.cache_utils import TrimKVCache

    if case.code == PACKAGE:
        return TrimKVCache(
            memory_size=case.memory, buffer_size=case.buffer, sliding_window_size=case.recent, device="cpu"
        )
    model.config.memory_size, model.config.buffer_size = case.memory, case.buffer
    model.config.compress_memory, model.config.compress_strategy = True, case.strategy
    return TrimKVCache(device="cpu")


def follow(model, cache):
    """A list that gets, after every forward, the positions that each head of each layer holds; and its hook."""
    log = []

    def note(*_):
        positions = [cache.log(i)["kv_positions"][0].tolist() for i in range(len(cache.layers))]
        log.append([[[p for p in head if p >= 0] for head in layer] for layer in positions])

    return log, model.model.register_forward_hook(note)


def generate(case: Case, model) -> tuple[list[int], list]:
    """All tokens, and the kept positions: forwards x layers x heads x positions."""
    cache = new_cache(case, model)
    kept, handle = follow(model, cache)
    ids = torch.empty(1, 0, dtype=torch.long)
    for turn in range(case.turns):
        ids = torch.cat([ids, torch.tensor(case.tokens(turn))], 1)
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )
    handle.remove()
    return ids[0].tolist(), kept


@torch.no_grad()
def forced(case: Case, model, ids: list[int]) -> list:
    """Kept positions where the tokens are given: a prompt, then one at a time."""
    cache = new_cache(case, model)
    kept, handle = follow(model, cache)
    for part in torch.tensor([ids[:-1]]).split([case.prompt, *[1] * (len(ids) - case.prompt - 1)], 1):
        model(input_ids=part, past_key_values=cache, use_cache=True)
    handle.remove()
    return kept
