"""Gate sets on disk: one safetensors file and one json, or the published config.json + trimkv_weights.pth."""

import json
import math
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

WEIGHTS, META = "gates.safetensors", "gates.json"
PUBLISHED_WEIGHTS, PUBLISHED_META = "trimkv_weights.pth", "config.json"
_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.retention_gate\.(.+)$")
_PARAMETERS = {
    frozenset({"linear1.weight", "linear1.bias", "linear2.weight", "bias"}): ("rg", "rg2"),
    frozenset({"gate_proj.weight", "up_proj.weight", "down_proj.weight", "bias"}): ("rg3",),
}


@dataclass
class GateSet:
    """The gates of one model.

    Attributes:
        layers: layer number -> parameter name -> tensor.
        meta: provenance: base_model, gate, intermediate_size, trained_budget, context, data, steps, tokens, seed, ...
        source: where it was read from, for messages.
    """

    layers: dict[int, dict[str, torch.Tensor]]
    meta: dict = field(default_factory=dict)
    source: str = "memory"

    def kind(self, hidden_size: int) -> str:
        """rg, rg2 or rg3, from the parameter names and the width of the input.

        rg and rg2 have the same names; rg reads ``hidden_size`` inputs. Else the declared kind tells.

        Raises:
            ValueError: parameters of an unknown gate, or layers of different kinds.
        """
        names = {frozenset(parameters) for parameters in self.layers.values()}
        if len(names) != 1 or (kinds := _PARAMETERS.get(next(iter(names)))) is None:
            found = ", ".join(sorted(set().union(*names)))
            raise ValueError(f"gates in {self.source}: parameters {found} belong to no known gate (rg, rg2, rg3)")
        declared = self.meta.get("gate") or self.meta.get("retention_gate")
        if len(kinds) == 1:
            return kinds[0]
        inputs = next(iter(self.layers.values()))["linear1.weight"].shape[1]
        if inputs != hidden_size:
            return "rg2"
        return declared if declared in kinds else "rg"

    @property
    def intermediate_size(self) -> int:
        parameters = next(iter(self.layers.values()))
        return parameters["linear1.weight" if "linear1.weight" in parameters else "gate_proj.weight"].shape[0]

    @property
    def shares(self) -> dict[int, float]:
        """By layer number, how much of the budget the layer should have: ``layer_shares`` of the provenance, 1 is the
        mean. All alike where nothing is said.

        Raises:
            ValueError: not one number above 0 per layer.
        """
        found = self.meta.get("layer_shares") or [1.0] * len(self.layers)
        sound = isinstance(found, list) and all(isinstance(x, int | float) and 0 < x < math.inf for x in found)
        if not sound or len(found) != len(self.layers):
            raise ValueError(f"gates in {self.source}: layer_shares must be one number above 0 for each layer")
        return {i: share * len(found) / sum(found) for i, share in zip(sorted(self.layers), found, strict=True)}

    @property
    def base_model(self) -> str | None:
        return self.meta.get("base_model")


def save_gates(gates, folder: str | Path, overwrite: bool = False, **meta) -> Path:
    """Writes a gate set: gates.safetensors and gates.json.

    Args:
        gates: a GateSet, or a model with gates attached.
        folder: made if absent.
        overwrite: replace gates that the folder holds.
        meta: provenance, added to what the gate set knows already.

    Raises:
        ValueError: a model without gates, or one that is sharded; a folder that holds gates.
    """
    from safetensors.torch import save_file

    refuse_held(folder, (WEIGHTS, META, PUBLISHED_WEIGHTS), overwrite)
    gates = gates if isinstance(gates, GateSet) else collect(gates)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.layers.{i}.self_attn.retention_gate.{name}": t.detach().cpu().contiguous()
        for i, parameters in gates.layers.items()
        for name, t in parameters.items()
    }
    meta = {"intermediate_size": gates.intermediate_size, **gates.meta, **meta}
    halves = {name: folder / f"{name}.part" for name in (WEIGHTS, META)}  # what was there stays until all is written
    try:
        save_file(tensors, halves[WEIGHTS], metadata={"format": "pt"})
        halves[META].write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")
        for name, half in halves.items():
            half.replace(folder / name)
    finally:
        for half in halves.values():
            half.unlink(missing_ok=True)
    return folder


def refuse_held(folder: str | Path, names: tuple[str, ...], overwrite: bool) -> None:
    """ValueError if a folder has files of these names and nobody said that they may be replaced."""
    held = [] if overwrite else [name for name in names if (Path(folder) / name).exists()]
    if held:
        raise ValueError(f"{folder} holds {held[0]} already: name another folder, or say overwrite=True to replace it")


def collect(model) -> GateSet:
    """The gates attached to a model."""
    layers: dict[int, dict[str, torch.Tensor]] = {}
    shares, meta = {}, {}
    for name, module in model.named_modules():
        if name.endswith("self_attn") and getattr(module, "retention_gate", None) is not None:
            if not module.retention_gate.part.whole:
                raise ValueError("each process has the gates of its own KV heads; save gates of a model that is whole")
            layers[module.layer_idx] = dict(module.retention_gate.state_dict())
            meta["gate"] = module.retention_gate.kind
            shares[module.layer_idx] = module.retention_gate.share
    if not layers:
        raise ValueError(f"{type(model).__name__} has no retention gates attached")
    if len(set(shares.values())) > 1:
        meta["layer_shares"] = [round(shares[i], 4) for i in sorted(shares)]
    if model.config._name_or_path:
        meta["base_model"] = model.config._name_or_path
    return GateSet(layers, meta, "the model")


def load_gates(source: str | Path) -> GateSet:
    """Reads a gate set from a folder or from a repository on the hub, in our layout or in the published one.

    Raises:
        ValueError: nothing there, a damaged file, or a checkpoint that holds more than tensors.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source))
    if (folder / WEIGHTS).is_file():
        return parse(_read_safetensors(folder / WEIGHTS), _read_json(folder / META), str(source))
    if (folder / PUBLISHED_WEIGHTS).is_file():
        meta = _read_json(folder / PUBLISHED_META)
        return parse(_read_pickle(folder / PUBLISHED_WEIGHTS), meta, str(source))
    raise ValueError(f"no gates in {source}: expected {WEIGHTS}, or {PUBLISHED_WEIGHTS} with {PUBLISHED_META}")


def parse(tensors: dict[str, torch.Tensor], meta: dict, source: str) -> GateSet:
    """Sorts tensors by layer; any prefix before ``layers.N`` is accepted."""
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.search(key)
        if match is None or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"gates in {source}: {key!r} is not a retention gate's parameter")
        layers.setdefault(int(match[1]), {})[match[2]] = tensor
    if not layers:
        raise ValueError(f"gates in {source}: the file holds no tensors")
    return GateSet(layers, meta, source)


def bundled() -> dict[str, Path]:
    """Gate sets that ship with the package: name of the base model -> folder."""
    root = Path(__file__).parent / "bundled"
    if not root.is_dir():
        return {}
    return {_read_json(folder / META)["base_model"]: folder for folder in root.iterdir() if (folder / META).is_file()}


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repo, allow_patterns=[WEIGHTS, META, PUBLISHED_WEIGHTS, PUBLISHED_META]))
    except HFValidationError:
        raise ValueError(f"gates: no such folder {repo}") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"gates: {repo} is no folder here and could not be fetched from the hub: {reason}") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"gates: {path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"gates: {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"gates: {path} holds no json object")
    return content


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"gates: {path} is damaged: {error}") from None


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise ValueError(f"gates: {path} is damaged or holds code, not only tensors; it was not loaded") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"gates: {path} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"gates: {path} holds no dictionary of tensors")
    return content
