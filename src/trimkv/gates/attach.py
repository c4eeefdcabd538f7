"""Puts gates on a stock transformers model and takes them off again."""

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers.activations import ACT2FN

from ..hf.calls import cache_in
from ..hf.lasting import lasting
from ..hf.model import compute_device, compute_dtype, decoder_of, full_attention_modules, key_heads, text_config
from ..ranks import part_of
from .files import GateSet, bundled, load_gates
from .gate import RetentionGate, output_bias

__all__ = ["attach", "detach", "new_gates", "output_bias"]

logger = logging.getLogger(__name__)


@lasting
def attach(model, gates: str | Path | GateSet = "bundled"):
    """Adds a ``retention_gate`` to each full-attention module, named as in the published checkpoints.

    A pre-hook computes log_beta from the hidden states and leaves it on the cache layer before the keys arrive; without
    a bounded cache it does nothing. Attaching again replaces the gates. If anything does not fit, the model stays as it
    was.

    On a model that transformers has sharded over processes (tensor parallel), call this in all of them with the same
    gates: each takes what belongs to its own KV heads.

    Args:
        model: a transformers decoder model.
        gates: "bundled", a folder, a repository on the hub, or a GateSet.

    Returns:
        The model.

    Raises:
        ValueError: gates that cannot be read or do not fit the model; the message names both. KV heads that cannot be
            shared out over the processes.
    """
    gates = resolve(model, gates)
    modules = full_attention_modules(model)
    built = _build(model, modules, gates)
    detach_gates(model)
    handles = []
    for i, gate in built.items():
        modules[i].retention_gate = gate
        handles.append(modules[i].register_forward_pre_hook(_stage_log_beta, with_kwargs=True))
    decoder_of(model)._trimkv_gate_handles = handles
    return model


def detach(model):
    """Takes off gates and hooks, those of bounded caches too: the model is stock again. Returns the model.

    It may be a wrapper of the model that they were put on by, or what is left of one.
    """
    from .head_sets import detach_heads

    detach_gates(model)
    detach_heads(model)
    decoder = decoder_of(model)
    hooks = getattr(decoder, "_trimkv_hooks", None)  # put there by the cache room, which this room does not know
    if hooks is not None:
        hooks.remove(decoder)
    return model


def detach_gates(model) -> None:
    decoder = decoder_of(model)
    for handle in getattr(decoder, "_trimkv_gate_handles", None) or ():
        handle.remove()
    decoder._trimkv_gate_handles = None
    for module in full_attention_modules(model).values():
        if getattr(module, "retention_gate", None) is not None:
            del module.retention_gate


def new_gates(
    model, kind: str = "rg", intermediate_size: int = 512, training_length: int = 2048, seed: int = 0
) -> GateSet:
    """Untrained gates for a model, initialised for training on sequences of ``training_length`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for i, module in full_attention_modules(model).items():
        gate = RetentionGate(kind, **shape_of(model, module), intermediate_size=intermediate_size)
        gate.initialise(training_length, generator=generator)
        layers[i] = dict(gate.state_dict())
    return GateSet(layers, {"gate": kind, "base_model": model.config._name_or_path}, "new gates")


def _stage_log_beta(module, args, kwargs):
    gate = module.retention_gate
    layers = getattr(cache_in(args, kwargs), "layers", ())
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    # A gate that reads keys and values is called by the cache layer, which sees them.
    if gate.reads_keys or "log_beta" not in getattr(getattr(layer, "policy", None), "needs", ()):
        return
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    with torch.no_grad(), getattr(layer, "beside", nullcontext)():
        layer.stage_log_beta(gate(hidden.to(gate.bias.device)))


def shape_of(model, module) -> dict:
    """What a gate of an attention module is made for: hidden_size, num_heads, head_dim, activation."""
    config = text_config(model)
    heads, head_dim = key_heads(model, module)
    names = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
    activation = next((act for act in (getattr(config, name, None) for name in names) if _is_plain(act)), "silu")
    return {"hidden_size": config.hidden_size, "num_heads": heads, "head_dim": head_dim, "activation": activation}


def _is_plain(activation) -> bool:
    """Whether a configuration's activation is a known function without parameters of its own."""
    return isinstance(activation, str) and activation in ACT2FN and not list(ACT2FN[activation].parameters())


def resolve(model, gates: str | Path | GateSet) -> GateSet:
    """The gate set that ``attach`` would take.

    Raises:
        ValueError: gates that cannot be read, or none that are bundled for the model.
    """
    if isinstance(gates, GateSet):
        return gates
    if gates != "bundled":
        return load_gates(gates)
    known = bundled()
    name = _name(model)
    for base_model, folder in known.items():
        if _same_model(base_model, name):
            return load_gates(folder)
    listed = ", ".join(known) if known else "none yet"
    raise ValueError(f"no gates are bundled for {name} (bundled: {listed}); pass a folder or a hub repository")


def _build(model, modules: dict, gates: GateSet) -> dict[int, RetentionGate]:
    name = _name(model)
    if sorted(gates.layers) != sorted(modules):
        raise ValueError(
            f"gates in {gates.source} (for {gates.base_model or 'an unnamed model'}) are for layers "
            f"{_span(gates.layers)}, {name} has full attention on layers {_span(modules)}"
        )
    if gates.base_model and not _same_model(gates.base_model, name):
        logger.warning("gates in %s were trained for %s and are put on %s", gates.source, gates.base_model, name)
    built, shares = {}, gates.shares
    for i, module in modules.items():
        shape = shape_of(model, module)
        kind, width = gates.kind(shape["hidden_size"]), gates.intermediate_size
        with torch.device("meta"):
            whole = RetentionGate(kind, **shape, intermediate_size=width)
        for parameter, own in whole.state_dict().items():
            given = gates.layers[i][parameter]
            if given.shape != own.shape:
                raise ValueError(
                    f"gates in {gates.source} (for {gates.base_model or 'an unnamed model'}) do not fit {name}: "
                    f"layer {i} {parameter} is {list(given.shape)}, the model needs {list(own.shape)}"
                )
        part = part_of(model, module, shape["num_heads"])
        gate = RetentionGate(kind, **shape, intermediate_size=width, part=part)
        gate.load_state_dict({name: gate.local(name, t) for name, t in gates.layers[i].items()})
        gate.share = shares[i]
        device, dtype = compute_device(model, module), compute_dtype(model)
        built[i] = gate.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return built


def _name(model) -> str:
    return model.config._name_or_path or type(model).__name__


def _same_model(a: str, b: str) -> bool:
    """Whether two names mean the same model: a hub id and a local copy of it share the last part of their path."""
    return a.rstrip("/").rsplit("/", 1)[-1].lower() == b.rstrip("/").rsplit("/", 1)[-1].lower()


def _span(numbers) -> str:
    numbers = sorted(numbers)
    return f"{numbers[0]}..{numbers[-1]} ({len(numbers)})" if numbers else "none"
