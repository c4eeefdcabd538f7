"""In kvpress's environment: tiny random models, and what each press keeps of a prompt.

    python dump.py FOLDER

Writes FOLDER/MODEL/ (config and weights as safetensors) and FOLDER/MODEL.npz with the token ids, the keys of the full
cache and, for every case and number of kept tokens, ``CASE/M/kept`` int64 [L, B, H, M] and the press's own scores
``CASE/M/scores`` fp32 [L, B, H, S]. Imports nothing of trimkv.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import kvpress
import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

B, S = 2, 200
BASE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {"llama": {"num_attention_heads": 4}, "qwen3": {"num_attention_heads": 6}}
GAIN = 2.0  # at the default initialisation attention is nearly uniform

# case -> (press, its options, numbers of kept tokens)
CASES = {
    "knorm": (kvpress.KnormPress, {}, (24, 48, 100)),
    "keydiff": (kvpress.KeyDiffPress, {}, (24, 48, 100)),
    "tova": (kvpress.TOVAPress, {}, (24, 48, 100)),
    "streaming_llm": (kvpress.StreamingLLMPress, {}, (24, 48, 100)),
    "snapkv": (kvpress.SnapKVPress, {"window_size": 8, "kernel_size": 5}, (24, 48, 100)),
    "snapkv_kernel_7": (kvpress.SnapKVPress, {"window_size": 20, "kernel_size": 7}, (48, 100)),
    "expected_attention": (kvpress.ExpectedAttentionPress, {}, (24, 48, 100)),
    "expected_attention_epsilon": (kvpress.ExpectedAttentionPress, {"epsilon": 1e-2}, (24, 48, 100)),
    "expected_attention_mean": (
        kvpress.ExpectedAttentionPress,
        {"n_future_positions": 64, "use_covariance": False, "use_vnorm": False},
        (24, 48, 100),
    ),
    # Scores are ranks within each of 23 partitions: after 4 sinks and a tail of 12, every 23 tokens there is a cut
    # without ties.
    "lagkv": (kvpress.LagKVPress, {"lag_size": 8}, (4 + 12 + 2 * 23, 4 + 12 + 4 * 23)),
    "lagkv_ties": (kvpress.LagKVPress, {"lag_size": 8}, (48, 100)),
    "lagkv_small_budget": (kvpress.LagKVPress, {"lag_size": 5}, (24,)),
    "lagkv_default": (kvpress.LagKVPress, {"lag_size": 24}, (100,)),
    "observed_attention": (kvpress.ObservedAttentionPress, {}, (24, 48, 100)),
}


def build(name: str, seed: int):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **BASE, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(GAIN)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def keys_after(model, ids, press=None) -> torch.Tensor:
    """[L, B, H, kept, D] after one prefill."""
    cache = DynamicCache(config=model.config)
    if press is None:
        model(ids, past_key_values=cache)
    else:
        with press(model):
            model(ids, past_key_values=cache)
    return torch.stack([layer.keys for layer in cache.layers])


def recorded(press, scores: list):
    """The press, with what its ``score`` returns written down, layer by layer."""
    score = press.score

    def and_note(*args, **kwargs):
        scores.append(score(*args, **kwargs))
        return scores[-1]

    press.score = and_note
    return press


def main():
    folder = Path(sys.argv[1])
    transformers.utils.logging.disable_progress_bar()
    for seed, name in enumerate(MODELS):
        model = build(name, seed)
        model.save_pretrained(folder / name)
        # No token twice in a row of the batch: equal tokens have equal keys before rotation, whose norms tie.
        generator = torch.Generator().manual_seed(seed)
        ids = torch.stack([torch.randperm(BASE["vocab_size"] - 3, generator=generator)[:S] + 3 for _ in range(B)])
        full = keys_after(model, ids)
        out = {"ids": ids, "keys": full}
        for case, (press, options, budgets) in CASES.items():
            for M in budgets:
                scores = []
                # int(S * (1 - ratio)) tokens stay: half a token more, so that rounding does not take one away.
                one = recorded(press(compression_ratio=1 - (M + 0.5) / S, **options), scores)
                kept = keys_after(model, ids, one)
                same = (kept[:, :, :, :, None] == full[:, :, :, None]).all(-1)  # [L, B, H, M, S]
                assert kept.shape[3] == M and (same.sum(-1) == 1).all(), f"{name} {case} {M}: not keys of the prompt"
                out[f"{case}/{M}/kept"] = same.int().argmax(-1)
                out[f"{case}/{M}/scores"] = torch.stack(scores).float()
        np.savez(folder / f"{name}.npz", **{key: t.numpy() for key, t in out.items()})
    versions = (f"{package} {version(package)}" for package in ("kvpress", "transformers", "torch"))
    (folder / "versions.txt").write_text(", ".join(versions) + "\n")


if __name__ == "__main__":
    main()
