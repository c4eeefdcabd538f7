"""Tiny base models and gates on disk, in the published layout, with weights that depend on nothing but a seed."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from peers.authors.exact_random import uniform

E, I, H, Q, D, L, V = 64, 96, 2, 4, 16, 3, 128  # hidden, MLP, KV heads, query heads, head dim, layers, vocabulary
WIDTH = 24  # of a gate's MLP
CONFIG = {
    "vocab_size": V,
    "hidden_size": E,
    "intermediate_size": I,
    "num_hidden_layers": L,
    "num_attention_heads": Q,
    "num_key_value_heads": H,
    "head_dim": D,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


def write(folder: Path, name: str, gate: str = "rg", seed: int = 0, **settings) -> str:
    """Writes ``base`` and ``gates`` into a folder; the latter is what ``from_pretrained`` of both packages takes.

    Args:
        name: qwen2, qwen3, llama or phi3.
        gate: rg, rg2 or rg3.
        settings: of the gates' config.json.

    Returns:
        SHA-256 of all names and numbers.
    """
    base = {key: _weights(key, shape, seed) for key, shape in base_shapes(name).items()}
    gates = {key: _weights(key, shape, seed) for key, shape in gate_shapes(gate).items()}
    config = {**CONFIG, "model_type": name, "architectures": [CLASSES[name]]}
    for part in ("base", "gates"):
        (folder / part).mkdir(parents=True)
    (folder / "base" / "config.json").write_text(json.dumps(config))
    save_file(base, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    settings = {
        **config,
        "base_model": str(folder / "base"),
        "retention_gate": gate,
        "retention_gate_intermediate_size": WIDTH,
        "trainable_params": "self_attn.retention_gate",
        "compress_memory": True,
        **settings,
    }
    (folder / "gates" / "config.json").write_text(json.dumps(settings))
    tensors = {key: torch.from_numpy(array) for key, array in gates.items()}
    torch.save(tensors, folder / "gates" / "trimkv_weights.pth")
    return checksum({**base, **gates})


def checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(arrays[key], "<f4").tobytes())
    return digest.hexdigest()


def base_shapes(name: str) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (V, E), "model.norm.weight": (E,), "lm_head.weight": (V, E)}
    attention = {"q_proj": (Q * D, E), "k_proj": (H * D, E), "v_proj": (H * D, E)}
    mlp = {"gate_proj": (I, E), "up_proj": (I, E)}
    if name == "phi3":
        attention, mlp = {"qkv_proj": ((Q + 2 * H) * D, E)}, {"gate_up_proj": (2 * I, E)}
    for i in range(L):
        layer = {f"self_attn.{key}.weight": shape for key, shape in {**attention, "o_proj": (E, Q * D)}.items()}
        layer |= {f"mlp.{key}.weight": shape for key, shape in {**mlp, "down_proj": (E, I)}.items()}
        layer |= {"input_layernorm.weight": (E,), "post_attention_layernorm.weight": (E,)}
        if name == "qwen2":
            layer |= {f"self_attn.{key}.bias": shape[:1] for key, shape in attention.items()}
        if name == "qwen3":
            layer |= {"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
        shapes |= {f"model.layers.{i}.{key}": shape for key, shape in layer.items()}
    return shapes


def gate_shapes(gate: str) -> dict[str, tuple[int, ...]]:
    inputs = E if gate == "rg" else 2 * H * D
    parameters = {"linear1.weight": (WIDTH, inputs), "linear1.bias": (WIDTH,), "linear2.weight": (H, WIDTH)}
    if gate == "rg3":
        parameters = {"gate_proj.weight": (WIDTH, inputs), "up_proj.weight": (WIDTH, inputs)}
        parameters["down_proj.weight"] = (H, WIDTH)
    parameters["bias"] = (H,)
    return {
        f"model.layers.{i}.self_attn.retention_gate.{key}": shape for i in range(L) for key, shape in parameters.items()
    }


def _weights(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Large enough that heads attend to few tokens and keep different ones."""
    numbers = uniform(*shape, seed=(seed, zlib.crc32(key.encode())))
    if "norm" in key:
        return 1 + 0.2 * numbers
    if key.endswith("retention_gate.bias"):
        return 3 + numbers
    return numbers * np.float32(0.5 if "retention_gate" in key else 0.15 if "embed" not in key else 1.0)
