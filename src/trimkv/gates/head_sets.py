"""Trained heads of baselines on stock models: put on, taken off, saved and loaded."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..hf.calls import cache_in
from ..hf.lasting import lasting
from ..hf.model import compute_device, compute_dtype, decoder_of, full_attention_modules, query_heads, text_config
from ..ranks import part_of
from .attach import _name, _same_model, _span, shape_of
from .files import _read_json, _read_safetensors, refuse_held
from .heads import BlockGate, RetainingHead

WEIGHTS, META = "heads.safetensors", "heads.json"
PLACES = {"locret": "retaining_head", "seer_attention_r": "attn_gate"}  # kind -> its name on an attention module
_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(\w+)\.(.+)$")


@dataclass
class HeadSet:
    """The heads of one kind for one model.

    Attributes:
        layers: layer number -> parameter name -> tensor.
        meta: kind ("locret" or "seer_attention_r"), base_model, and how it was trained.
        source: where it was read from, for messages.
    """

    layers: dict[int, dict[str, torch.Tensor]]
    meta: dict = field(default_factory=dict)
    source: str = "memory"

    @property
    def kind(self) -> str:
        return self.meta["kind"]


@lasting
def attach_heads(model, heads: "str | Path | HeadSet"):
    """Puts heads on a model's full-attention modules, beside gates or heads of another kind.

    Without a bounded cache whose policy asks for them they do nothing. If anything does not fit, the model stays as it
    was.

    Args:
        model: a transformers decoder model.
        heads: the name of a kind for those that are bundled, a folder, or a HeadSet.

    Returns:
        The model.

    Raises:
        ValueError: heads that cannot be read or do not fit the model; the message names both. A model whose KV heads
            are shared out over processes (tensor parallel).
    """
    heads = _resolve(model, heads)
    modules = full_attention_modules(model)
    if any(not part_of(model, one, shape_of(model, one)["num_heads"]).whole for one in modules.values()):
        raise ValueError(
            f"{heads.kind} heads read all heads of a layer, and those of {_name(model)} are shared out over processes: "
            "load the model in one process, or take a policy without such heads"
        )
    if sorted(heads.layers) != sorted(modules):
        raise ValueError(
            f"heads in {heads.source} are for layers {_span(heads.layers)}, {_name(model)} has full attention on "
            f"layers {_span(modules)}"
        )
    built = {}
    for i, module in modules.items():
        head = _new(model, module, heads)
        for name, own in head.state_dict().items():
            given = heads.layers[i].get(name)
            if given is None or given.shape != own.shape:
                found = "missing" if given is None else list(given.shape)
                raise ValueError(
                    f"heads in {heads.source} (for {heads.meta.get('base_model') or 'an unnamed model'}) do not fit "
                    f"{_name(model)}: layer {i} {name} is {found}, the model needs {list(own.shape)}"
                )
        head.load_state_dict(heads.layers[i])
        device, dtype = compute_device(model, module), compute_dtype(model)
        built[i] = head.to(device, dtype).requires_grad_(False).eval()
    place = PLACES[heads.kind]
    detach_heads(model, heads.kind)
    handles = decoder_of(model).__dict__.setdefault("_trimkv_head_handles", {})
    handles[heads.kind] = []
    for i, module in modules.items():
        setattr(module, place, built[i])
        if heads.kind == "locret":
            handles[heads.kind] += _listen(module)
    return model


def detach_heads(model, kind: str | None = None) -> None:
    """Takes heads of a kind off a model, or all."""
    handles = decoder_of(model).__dict__.get("_trimkv_head_handles") or {}
    for one in [kind] if kind else list(PLACES):
        for handle in handles.pop(one, ()):
            handle.remove()
        for module in full_attention_modules(model).values():
            if getattr(module, PLACES[one], None) is not None:
                delattr(module, PLACES[one])


def new_heads(model, kind: str, width: int | None = None, block_size: int = 64, seed: int = 0) -> HeadSet:
    """Untrained heads for a model.

    Args:
        kind: "locret" or "seer_attention_r".
        width: of a retaining head's hidden layer (published: 1024) or of a block gate's vectors (published: 128).
        block_size: tokens per block, for seer_attention_r.

    Raises:
        ValueError: unknown kind, or a model whose projections cannot be found.
    """
    if kind not in PLACES:
        raise ValueError(f"unknown kind of heads {kind!r}; known kinds: {', '.join(PLACES)}")
    meta = {"kind": kind, "base_model": model.config._name_or_path, "width": width or (1024, 128)[kind != "locret"]}
    if kind == "seer_attention_r":
        meta |= {"block_size": block_size, "rope_theta": _rope_theta(model)}
    heads, generator = HeadSet({}, meta, "new heads"), torch.Generator().manual_seed(seed)
    for i, module in full_attention_modules(model).items():
        head = _new(model, module, heads)
        head.initialise(generator)
        heads.layers[i] = dict(head.state_dict())
    return heads


def save_heads(
    heads,
    folder: str | Path,
    kind: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    **meta,
) -> Path:
    """Writes heads.safetensors and heads.json.

    Args:
        heads: a HeadSet, or a model with heads of ``kind`` attached.
        dtype: of the tensors in the file; None leaves them as they are.
        overwrite: replace heads that the folder holds.
        meta: provenance, added to what the set knows already.

    Raises:
        ValueError: a model without such heads; a folder that holds heads.
    """
    from safetensors.torch import save_file

    refuse_held(folder, (WEIGHTS, META), overwrite)
    heads = heads if isinstance(heads, HeadSet) else collect_heads(heads, kind)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.layers.{i}.self_attn.{PLACES[heads.kind]}.{name}": t.detach().to("cpu", dtype or t.dtype).contiguous()
        for i, parameters in heads.layers.items()
        for name, t in parameters.items()
    }
    halves = {name: folder / f"{name}.part" for name in (WEIGHTS, META)}  # what was there stays until all is written
    try:
        save_file(tensors, halves[WEIGHTS], metadata={"format": "pt"})
        halves[META].write_text(json.dumps({**heads.meta, **meta}, indent=2, sort_keys=True) + "\n")
        for name, half in halves.items():
            half.replace(folder / name)
    finally:
        for half in halves.values():
            half.unlink(missing_ok=True)
    return folder


def collect_heads(model, kind: str) -> HeadSet:
    """The heads of a kind that are attached to a model."""
    layers, meta = {}, {"kind": kind}
    for i, module in full_attention_modules(model).items():
        head = getattr(module, PLACES[kind], None)
        if head is None:
            raise ValueError(f"{type(model).__name__} has no {kind} heads attached")
        layers[i] = dict(head.state_dict())
        if kind == "seer_attention_r":
            meta |= {"width": head.width, "block_size": head.block_size, "rope_theta": head.rope_theta}
        else:
            meta["width"] = head.fc1.out_features
    if model.config._name_or_path:
        meta["base_model"] = model.config._name_or_path
    return HeadSet(layers, meta, "the model")


def load_heads(folder: str | Path) -> HeadSet:
    """Reads a folder with heads.safetensors and heads.json.

    Raises:
        ValueError: nothing there, a damaged file, or tensors of something else.
    """
    path = Path(folder)
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"no heads in {folder}: expected {WEIGHTS} and {META}")
    meta = _read_json(path / META)
    if meta.get("kind") not in PLACES:
        raise ValueError(f"heads in {folder}: kind {meta.get('kind')!r} is none of {', '.join(PLACES)}")
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in _read_safetensors(path / WEIGHTS).items():
        match = _KEY.search(key)
        if match is None or match[2] != PLACES[meta["kind"]]:
            raise ValueError(f"heads in {folder}: {key!r} is no parameter of {meta['kind']} heads")
        layers.setdefault(int(match[1]), {})[match[3]] = tensor
    return HeadSet(layers, meta, str(folder))


def bundled_heads(kind: str) -> dict[str, Path]:
    """Heads of a kind that ship with the package: name of the base model -> folder."""
    found = {}
    for path in sorted((Path(__file__).parent / "bundled").glob(f"*/{META}")):
        meta = _read_json(path)
        if meta.get("kind") == kind:
            found[meta["base_model"]] = path.parent
    return found


def projections(module) -> list[torch.nn.Module]:
    """The modules whose outputs are queries, keys and values before rotation; one where they are fused."""
    names = ("qkv_proj",) if getattr(module, "qkv_proj", None) is not None else ("q_proj", "k_proj", "v_proj")
    found = [getattr(module, name, None) for name in names]
    if found[0] is None:
        raise ValueError(f"{type(module).__name__} has neither q_proj nor qkv_proj: retaining heads do not fit")
    return [one for one in found if one is not None]


def _listen(module) -> list:
    """Lets a retaining head hear the projections of forwards whose cache asks for its scores."""
    head, parts = module.retaining_head, projections(module)
    handles = [part.register_forward_hook(_Hear(head, i, len(parts))) for i, part in enumerate(parts)]
    return [module.register_forward_pre_hook(_before_projections, with_kwargs=True), *handles]


def _before_projections(module, args, kwargs) -> None:
    layers = getattr(cache_in(args, kwargs), "layers", ())
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    wanted = getattr(getattr(layer, "policy", None), "head", None) == "retaining_head"
    module.retaining_head.begin(wanted)


@dataclass(frozen=True)
class _Hear:
    """A hook on a projection, which can be pickled with the model."""

    head: RetainingHead
    place: int
    of: int

    def __call__(self, part, args, output) -> None:
        self.head.hear(self.place, self.of, output.detach())


def _new(model, module, heads: HeadSet):
    shape, meta = shape_of(model, module), heads.meta
    if heads.kind == "locret":
        inputs = sum(getattr(part, "out_features", None) or part.weight.shape[0] for part in projections(module))
        return RetainingHead(inputs, shape["num_heads"], meta["width"], shape["activation"])
    group = query_heads(model, module) // shape["num_heads"]
    return BlockGate(
        shape["num_heads"], group, shape["head_dim"], meta["width"], meta["block_size"], meta["rope_theta"]
    )


def _rope_theta(model) -> float:
    rope = getattr(text_config(model), "rope_parameters", None) or {}
    return float(rope.get("full_attention", rope).get("rope_theta") or 10000.0)


def _resolve(model, heads) -> HeadSet:
    if isinstance(heads, HeadSet):
        return heads
    if heads not in PLACES:
        return load_heads(heads)
    known, name = bundled_heads(heads), _name(model)
    for base_model, folder in known.items():
        if _same_model(base_model, name):
            return load_heads(folder)
    listed = ", ".join(known) if known else "none yet"
    raise ValueError(f"no {heads} heads are bundled for {name} (bundled: {listed}); pass a folder with trained ones")
