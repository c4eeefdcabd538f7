"""Base models and gate folders in the published layout, written by hand; no test in this folder has a network."""

import json
import socket

import pytest
import torch
from transformers.utils import logging

import tiny
from trimkv.models.llama import TrimKVLlamaForCausalLM
from trimkv.models.phi3 import TrimKVPhi3ForCausalLM
from trimkv.models.qwen3 import TrimKVQwen3ForCausalLM

CLASSES = {"qwen3": TrimKVQwen3ForCausalLM, "llama": TrimKVLlamaForCausalLM, "phi3": TrimKVPhi3ForCausalLM}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test tried to reach the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    logging.disable_progress_bar()


@pytest.fixture(params=CLASSES)
def name(request):
    return request.param


def gate_tensors(config, kind="rg", width=24, layers=None):
    """Random gates of widely different retention, under the published keys."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape, std=0.3):
        return torch.randn(*shape, generator=generator) * std

    heads = config.num_key_value_heads
    inputs = config.hidden_size if kind == "rg" else 2 * heads * (config.hidden_size // config.num_attention_heads)
    tensors = {}
    for i in range(layers or config.num_hidden_layers):
        prefix = f"model.layers.{i}.self_attn.retention_gate."
        if kind == "rg3":
            tensors |= {prefix + f"{side}_proj.weight": random(width, inputs) for side in ("gate", "up")}
            tensors[prefix + "down_proj.weight"] = random(heads, width)
        else:
            tensors |= {prefix + "linear1.weight": random(width, inputs), prefix + "linear1.bias": random(width)}
            tensors[prefix + "linear2.weight"] = random(heads, width)
        tensors[prefix + "bias"] = 3 + random(heads)
    return tensors


@pytest.fixture
def publish(tmp_path):
    """publish(name, **settings): a gate folder whose base model lies beside it; ``tmp_path / "base"`` is the latter."""

    def write(name, kind="rg", changes=None, **settings):
        base = tiny.build(name, **(changes or {}))
        base.save_pretrained(tmp_path / "base")
        folder = tmp_path / "gates"
        folder.mkdir()
        config = {
            **base.config.to_dict(),
            "base_model": str(tmp_path / "base"),
            "retention_gate": kind,
            "retention_gate_intermediate_size": 24,
            "trainable_params": "self_attn.retention_gate",
            "memory_size": 16,
            "buffer_size": 4,
            "compress_memory": True,
            "compress_strategy": "alpha",
            **settings,
        }
        config = {key: value for key, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))
        torch.save(gate_tensors(base.config, kind), folder / "trimkv_weights.pth")
        return folder

    return write
