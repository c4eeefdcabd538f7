"""Generations and kept sets of the authors' code, as JSON. Runs in its environment; parity.sh calls it.

python generations.py CODE OUT        # CODE: 0.1.5, or 0456bc4 with its src folder on PYTHONPATH
"""

import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from peers.authors import checkpoints
from peers.authors.cases import NEW, PACKAGE, Case, all_cases
from peers.authors.decode import without_flash_attn

ATTENTION = "exact_causal"


def exact_causal(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What flash-attn does: the newest query sees every key, the one before it all but the last."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    T, S = query.shape[2], key.shape[2]
    ahead = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
    weights = (query @ key.mT * scaling).masked_fill(ahead, -torch.inf).softmax(-1, dtype=torch.float32)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


def load(case: Case, folder: Path, dtype: torch.dtype):
    if not folder.exists():
        checkpoints.write(folder, case.model, case.gate, case.seed)
    cls = getattr(import_module(f"trimkv.models.{case.model}"), f"TrimKV{checkpoints.CLASSES[case.model]}")
    model = cls.from_pretrained(
        str(folder / "gates"), torch_dtype=dtype, load_trimkv_weights=True, download_from="local", use_cache=True
    )
    model.config._attn_implementation = ATTENTION
    return model.eval()


def new_cache(case: Case, model):
    from trimkv.cache_utils import TrimKVCache

    if case.code == PACKAGE:
        return TrimKVCache(
            memory_size=case.memory, buffer_size=case.buffer, sliding_window_size=case.recent, device="cpu"
        )
    model.config.memory_size, model.config.buffer_size = case.memory, case.buffer
    model.config.compress_memory, model.config.compress_strategy = True, case.strategy
    model.config.floor_budget_ratio = 0
    return TrimKVCache(device="cpu")


def follow(model, cache):
    """A list that gets, after every forward, the positions that each head of each layer holds; and its hook."""
    log = []

    def note(*_):
        log.append([positions[0].sort(-1).values.tolist() for positions in cache.kv_positions])

    handle = model.model.register_forward_hook(note)
    return log, handle


def generate(case: Case, model) -> tuple[list[int], list]:
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
    """Kept sets where the tokens are given: a prompt, then one at a time."""
    cache = new_cache(case, model)
    kept, handle = follow(model, cache)
    for part in torch.tensor([ids[:-1]]).split([case.prompt, *[1] * (len(ids) - case.prompt - 1)], 1):
        model(input_ids=part, past_key_values=cache, use_cache=True)
    handle.remove()
    return kept


def main(code: str, out: str) -> None:
    import trimkv

    installed = "site-packages" in trimkv.__file__
    assert installed == (code == PACKAGE), f"{code} was asked for, {trimkv.__file__} is imported"
    torch.set_num_threads(1)  # the models are tiny
    logging.set_verbosity_error()  # the gates' parameters are "newly initialized" until they are loaded
    AttentionInterface.register(ATTENTION, exact_causal)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in all_cases():
            if case.code != code:
                continue
            folder = Path(scratch) / f"{case.model}-{case.gate}-{case.seed}"
            ids, kept = generate(case, load(case, folder, torch.float32))
            found[case.name] = {"tokens": ids, "kept": kept}
            if case.turns == 1:
                found[case.name]["bf16"] = forced(case, load(case, folder, torch.bfloat16), ids)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    without_flash_attn()
    main(*sys.argv[1:])
