"""What the published model classes add to a stock transformers class: loading with gates, and a default cache."""

import copy
import functools
import json
import logging
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.utils import is_accelerate_available

from ..cache.hooks import install
from ..cache_utils import TrimKVCache, check_strategy
from ..gates.attach import attach, new_gates
from ..gates.files import META, PUBLISHED_META, PUBLISHED_WEIGHTS, WEIGHTS, GateSet, load_gates, save_gates
from ..gates.gate import KINDS
from ..hf.calls import cache_argument
from .locate import HUB_OPTIONS, base_of, gate_folder, reason

logger = logging.getLogger(__name__)

# Settings that a published config.json may leave out, where the released classes agree.
DEFAULTS = {
    "retention_gate": "rg",
    "retention_gate_intermediate_size": 512,
    "retention_gate_bias_init": 10.0,
    "retention_weight": 1.0,
    "trainable_params": None,
    "base_loss": "fwkl",
    "attn_impl": "rg_attn_flex",
    "max_seq_len": 20480,
    "compress_memory": True,
    "compress_strategy": "alpha",
    "floor_budget_ratio": 0,
    "memory_size": 1024,
    "buffer_size": 1,
    "global_capacity": True,
    "tie_retention_gate_layers": True,
}
# Arguments of from_pretrained that are attributes of a config too.
_NOT_SETTINGS = ("dtype", "attn_implementation", "quantization_config", "name_or_path")

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # values of device_map that need accelerate


class PublishedModel:
    """Mixed into a stock ``...ForCausalLM``; model code stays stock.

    What a stock model does works: batches with left padding, sampling, beams, several turns on one cache, saving and
    loading again, ``dtype`` or ``torch_dtype``, ``device_map``. ``model.config.compress_memory = False`` keeps every
    token.

    Different on purpose from the released package 0.1.5: ``generate`` without ``past_key_values`` makes a
    ``TrimKVCache`` (there, it fails); memory_size, buffer_size, compress_strategy and compress_memory of the config
    count, as in the code that came with the paper; ``download_from`` defaults to "huggingface", which takes folders
    too; training needs ``trimkv train``, not ``model(..., labels=...)``, whose loss is the stock one.
    """

    published_defaults: dict = DEFAULTS
    _keys_to_ignore_on_load_unexpected = [r"\.retention_gate\."]

    @classmethod
    def from_pretrained(
        cls, path, load_trimkv_weights: bool = True, download_from: str = "huggingface", *model_args, **kwargs
    ):
        """Loads the base weights, puts the gates on, and selects slot attention.

        Args:
            path: where the gates are. Beside published ones lies a config.json, beside ours a gates.json; its
                ``base_model`` says where the base weights are ("smollm2" is the default model, fetched if need be).
                Settings that gates.json does not have are this class's defaults: memory_size is not its
                trained_budget.
            load_trimkv_weights: False starts with fresh gates, initialised from ``retention_gate_bias_init``.
            download_from: "huggingface" (a folder or a repository), "local" (a folder; no network, for the base weights
                either), or "wandb" (an artifact).
            kwargs: settings, such as memory_size=512, go into ``model.config``; all else goes to transformers.

        Raises:
            ValueError: something that does not exist, cannot be read, or does not fit; the message names it.
        """
        path = str(path)
        if "torch_dtype" in kwargs:  # the former name
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        if download_from == "local":
            kwargs.setdefault("local_files_only", True)
        hub_options = {k: kwargs[k] for k in HUB_OPTIONS if k in kwargs}
        folder = gate_folder(path, download_from, hub_options)
        hub_options.pop("revision", None)  # of the gates' repository
        config = copy.deepcopy(kwargs.pop("config", None)) or _read_config(
            cls, folder, hub_options, network=download_from != "local"
        )
        _check_kind(config, folder)
        gates = _read_gates(folder) if load_trimkv_weights else None
        if getattr(config, "base_model", None):
            base = base_of(config.base_model, folder, network=download_from != "local")
            kwargs.pop("revision", None)
        else:
            base = path if download_from == "huggingface" else str(folder)
            if gates is not None:
                gates.meta.pop("base_model", None)  # they lie beside their base: no need to compare names
        _settle(cls, config, base, kwargs)
        loaded = _load_base(super().from_pretrained, base, path, config, model_args, kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        attach(model, gates or _fresh_gates(model))
        install(model)
        return loaded

    def __call__(self, *args, **kwargs):
        if kwargs.get("base_logits") is not None:  # stock models would take and ignore it
            raise ValueError("base_logits is for training, which is `trimkv train` here, or trimkv.train.trainer.train")
        return super().__call__(*args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Writes a folder that holds base weights and gates: this class loads it, stock classes load its base model."""
        self._keys_to_ignore_on_save |= {name for name, _ in self.named_parameters() if ".retention_gate." in name}
        super().save_pretrained(save_directory, *args, **kwargs)
        save_gates(self, save_directory, overwrite=True)  # as save_pretrained does with everything
        written = Path(save_directory) / PUBLISHED_META
        settings = json.loads(written.read_text())
        settings.pop("base_model", None)
        settings["architectures"] = [type(self).__name__.removeprefix("TrimKV")]
        written.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """generate without a cache makes a TrimKVCache, unless another cache, or none, was asked for.

        A model with LongRoPE gets one even where compress_memory is off, to keep every token: stock Phi-3 drops its
        cache when a sequence grows past the original context.
        """
        other = generation_config.cache_implementation is not None or generation_config.is_assistant
        rope = getattr(self.config, "rope_parameters", None) or {}
        ours = getattr(self.config, "compress_memory", False) or rope.get("rope_type") == "longrope"
        if ours and not other and generation_config.use_cache is not False:
            name = cache_argument(self)
            if model_kwargs.get(name) is None:
                model_kwargs[name] = TrimKVCache()
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def _read_config(cls, folder: Path, hub_options: dict, network: bool):
    if not (folder / PUBLISHED_META).exists() and (folder / META).exists():
        return _config_of_base(cls, folder, hub_options, network)
    try:
        settings = json.loads((folder / PUBLISHED_META).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no readable {PUBLISHED_META}, nor a {META}: {reason(error)}") from None
    kind = settings.get("model_type", cls.config_class.model_type)
    if kind != cls.config_class.model_type:
        raise ValueError(f"{folder} is for a {kind} model, {cls.__name__} is for {cls.config_class.model_type}")
    return cls.config_class.from_dict(settings)


def _config_of_base(cls, folder: Path, hub_options: dict, network: bool):
    """For gates in our layout: the base model's config, and what gates.json says of the gates."""
    try:
        meta = json.loads((folder / META).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no readable {META}: {reason(error)}") from None
    if not isinstance(meta, dict) or not meta.get("base_model"):
        raise ValueError(
            f"{folder / META} names no base_model: add it, or load the model yourself and call "
            f"trimkv.attach(model, gates={str(folder)!r})"
        )
    base = base_of(meta["base_model"], folder, network)
    try:
        config = AutoConfig.from_pretrained(base, **hub_options)
    except (OSError, ValueError) as error:
        raise ValueError(f"base model {base}, named in {folder / META}, could not be read: {reason(error)}") from error
    if config.model_type != cls.config_class.model_type:
        raise ValueError(
            f"{folder} is for a {config.model_type} model, {cls.__name__} is for {cls.config_class.model_type}"
        )
    config.base_model = base
    config.retention_gate = meta.get("gate", "rg")
    if "intermediate_size" in meta:
        config.retention_gate_intermediate_size = meta["intermediate_size"]
    return config


def _check_kind(config, folder: Path) -> None:
    kind = getattr(config, "retention_gate", None) or KINDS[0]
    if kind not in KINDS:
        raise ValueError(
            f"{folder}: gates of kind {kind} are not supported (those of DBTrimKV checkpoints are rg10); known kinds: "
            f"{', '.join(KINDS)}, which TrimKV checkpoints have"
        )


def _read_gates(folder: Path) -> GateSet:
    if not any((folder / name).is_file() for name in (WEIGHTS, PUBLISHED_WEIGHTS)):
        raise ValueError(
            f"no gates in {folder}: expected {PUBLISHED_WEIGHTS} with {PUBLISHED_META}, or {WEIGHTS} with {META}; "
            "load_trimkv_weights=False starts with fresh ones"
        )
    return load_gates(folder)


def _settle(cls, config, base: str, kwargs: dict) -> None:
    """Completes the config and moves settings out of the keyword arguments into it."""
    for name, value in cls.published_defaults.items():
        if not hasattr(config, name):
            setattr(config, name, value)
    for name in list(kwargs):
        if name not in _NOT_SETTINGS and hasattr(config, name):
            setattr(config, name, kwargs.pop(name))
    config.base_model = base
    check_strategy(config.compress_strategy)
    if getattr(config, "skip_layers", 0):
        raise ValueError(f"skip_layers={config.skip_layers} is not supported: every layer is bounded")
    asked = kwargs.get("attn_implementation") or config._attn_implementation
    if isinstance(asked, str) and "flash" in asked:
        _say_replaced(asked)
        kwargs["attn_implementation"] = "sdpa"


@functools.cache
def _say_replaced(attention: str) -> None:
    logger.warning("attn_implementation=%r is not used: attention over slots takes its place", attention)


def _load_base(from_pretrained, base: str, path: str, config, model_args, kwargs):
    device = _single_device(kwargs)
    try:
        loaded = from_pretrained(base, *model_args, config=config, **kwargs)
    except OSError as error:
        hint = "download_from='local' uses no network" if kwargs.get("local_files_only") else "base_model names it"
        raise ValueError(f"base weights {base} of {path} could not be loaded ({hint}): {reason(error)}") from error
    if device is not None:
        (loaded[0] if isinstance(loaded, tuple) else loaded).to(device)
    return loaded


def _single_device(kwargs: dict) -> torch.device | None:
    """The device of a ``device_map`` that names one, where accelerate, which transformers would ask for, is absent."""
    place = kwargs.get("device_map")
    if is_accelerate_available() or place is None or isinstance(place, dict) or place in _SPREAD:
        return None
    return torch.device(kwargs.pop("device_map"))


def _fresh_gates(model) -> GateSet:
    config = model.config
    gates = new_gates(model, config.retention_gate, config.retention_gate_intermediate_size)
    for parameters in gates.layers.values():
        parameters["bias"].fill_(config.retention_gate_bias_init)
    return gates
