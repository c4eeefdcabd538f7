"""All that decides what a training gives: stored with it, so that it is never taken up as another one."""

from dataclasses import asdict

import torch

from .. import fingerprint
from . import processes

TRAINED = ("retention_gate", "retaining_head", "attn_gate")  # parts that trainings put on a model
# Fields of a configuration that change how a training runs, and not what it computes.
HOW = ("save_steps", "report_to", "checkpointing", "cuda_graph", "compile")
SAMPLES = 64  # values of a weight that are looked at


def settings_of(config) -> dict:
    """The fields of a GateConfig or HeadConfig that change what is computed."""
    return {name: value for name, value in asdict(config).items() if name not in HOW}


def versions() -> dict:
    """Of what computes. The build of torch ("+cu130") is left out."""
    import transformers

    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


def made_of(model, dataset, config, method: str, base_model: str | None, start) -> dict:
    """What a training is made of.

    Args:
        model: before gates or heads are attached.
        dataset: if it has a ``fingerprint()``, that is taken; else its first sample stands for it.
        config: a GateConfig or HeadConfig.
        method: what is trained.
        base_model: the model's name; its last part counts, as a copy in another folder is the same model.
        start: the GateSet or HeadSet that the training begins with, or None.
    """
    name = (base_model or model.config._name_or_path or type(model).__name__).rstrip("/").rsplit("/", 1)[-1]
    return {
        "method": method,
        "model": name.lower(),
        "weights": of_weights(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        **_data_of(dataset),
        "start": start and of_set(start),
        "processes": processes.count(),
        **settings_of(config),
        "versions": versions(),
    }


def of_weights(model) -> str:
    """A digest of a model's weights: of names, shapes and some values of each. What was trained for it is left out.

    Weights that are no plain tensors (offloaded, or of a quantiser's own class) count by name and shape.
    """
    names, values = [], []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(f".{part}." in name for part in TRAINED):
            continue
        names.append([name, list(tensor.shape), str(tensor.dtype)])
        if type(tensor.data) is torch.Tensor and tensor.device.type != "meta" and tensor.numel():
            values.append(tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLES)][:SAMPLES].float().cpu())
    return fingerprint.of_json([names, fingerprint.of_tensors(values)])


def of_trained_parts(model) -> dict[str, str]:
    """What trainings put on a model: kind of part -> digest of its weights."""
    found = {}
    for part in TRAINED:
        tensors = [p for name, p in model.named_parameters() if f".{part}." in name]
        if tensors:
            found[part] = fingerprint.of_tensors(tensors)
    return found


def of_set(trained) -> str:
    """A digest of a GateSet or HeadSet: its tensors, and the shares that its layers have of a budget."""
    tensors = [t for _, layer in sorted(trained.layers.items()) for _, t in sorted(layer.items())]
    return fingerprint.of_json([fingerprint.of_tensors(tensors), trained.meta.get("layer_shares")])


def _data_of(dataset) -> dict:
    if hasattr(dataset, "fingerprint"):
        return dataset.fingerprint()
    first = dataset[0]
    return {"data": [type(dataset).__name__], "tokens": fingerprint.of_tensors(first[name] for name in sorted(first))}
