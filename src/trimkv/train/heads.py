"""Training of the trained baselines' heads: the Trainer of the gates, another loss on the same frozen model.

The losses are local to a layer: one forward pass of the frozen model, without gradients, shows each head what it has to
learn, and nothing is sent back through the model.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, get_scheduler
from transformers.masking_utils import sdpa_mask

from ..attention.decay import decayed_attention
from ..attention.register import trimkv_attention
from ..gates.head_sets import PLACES, HeadSet, attach_heads, load_heads, new_heads, save_heads
from ..hf.model import compute_dtype, decoder_of, full_attention_modules, why_unserved
from . import run_folder
from .head_losses import Documents, LocretTask, SeerTask
from .made_of import made_of
from .trainer import GateTrainer, fit, place

NAME, HYBRID_NAME = "trimkv_heads", "trimkv_heads_hybrid"
SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True)
class HeadConfig:
    """How heads are trained; the defaults of ``locret`` and ``seer_attention_r`` are the published ones.

    Args:
        method: "locret" or "seer_attention_r".
        width: see ``new_heads``.
        block_size: tokens per block, for seer_attention_r.
        share: of a document whose queries are learnt from, see ``LocretTask`` and ``SeerTask``.
        smoothness: see ``LocretTask``.
        context, steps, batch_size, accumulation, save_steps, seed, report_to: as in ``GateConfig``.
        schedule: of the learning rate after the warm-up, "linear" to nothing or "cosine" to ``min_learning_rate`` (a
            share).
        clip: largest norm of the gradient.
        clip_value: largest entry of the gradient, in place of ``clip``.
        compile: fuse what reads the attention logits with torch.compile: half a minute's wait on a GPU, then faster.
            For locret; seer_attention_r has a kernel for blocks of a power of two up to 128 tokens.
    """

    method: str
    width: int
    share: float
    learning_rate: float
    warmup_steps: int
    steps: int
    batch_size: int
    schedule: str
    context: int = 2048
    block_size: int = 64
    smoothness: float = 0.0025
    accumulation: int = 1
    min_learning_rate: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip: float = 1.0
    clip_value: float | None = None
    seed: int = 0
    save_steps: int = 0
    compile: bool = False
    report_to: tuple[str, ...] = field(default=())

    def __post_init__(self):
        if self.method not in PLACES:
            raise ValueError(f"method must be one of {', '.join(PLACES)}, got {self.method!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        for name in ("width", "steps", "batch_size", "accumulation", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.context < 2:
            raise ValueError(f"context must be at least 2 tokens, got {self.context}")
        if not 0 < self.share <= 1 or (self.share == 1 and self.method == "locret"):
            raise ValueError(f"share must be above 0 and below 1, got {self.share}")

    @classmethod
    def locret(cls, **changes) -> "HeadConfig":
        """LocRet's settings (locret/train/train.py): samples one by one, two thirds of the steps to warm up."""
        settings = {
            "method": "locret",
            "width": 1024,
            "share": 0.25,
            "learning_rate": 5e-4,
            "warmup_steps": 2000,
            "steps": 3000,
            "batch_size": 1,
            "schedule": "linear",
            "weight_decay": 0.01,
            "betas": (0.9, 0.95),
            "clip_value": 0.5,
        }
        return cls(**{**settings, **changes})

    @classmethod
    def seer_attention_r(cls, **changes) -> "HeadConfig":
        """SeerAttention-R's settings (arXiv 2506.08889, section 4.1); the source's context is 32,768."""
        settings = {
            "method": "seer_attention_r",
            "width": 128,
            "share": 0.5,
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-2,
            "warmup_steps": 20,
            "steps": 800,
            "batch_size": 16,
            "schedule": "cosine",
        }
        return cls(**{**settings, **changes})


class HeadStudent(nn.Module):
    """Computes the loss of a batch. Only the heads have gradients.

    Args:
        model: a transformers decoder model with heads attached.
        config: the training's numbers.
    """

    def __init__(self, model, config: HeadConfig):
        super().__init__()
        self.model, self.settings = model, config
        self.modules_with_heads = list(full_attention_modules(model).values())
        model.requires_grad_(False)
        self.hooks, self.previous_attention = [], model.config._attn_implementation
        for module in self.modules_with_heads:
            # fp32 masters whatever the model's dtype: steps are far smaller than bf16's grid
            self._head(module).float().requires_grad_(True)
            module.__dict__["head_student"] = self
            self.hooks.append(module.register_forward_pre_hook(_take_rotation, with_kwargs=True))
        AttentionInterface.register(NAME, _attention)
        AttentionInterface.register(HYBRID_NAME, _attention)
        AttentionMaskInterface.register(HYBRID_NAME, sdpa_mask)
        text = model.config.get_text_config(decoder=True)
        model.set_attn_implementation(NAME if len(self.modules_with_heads) == text.num_hidden_layers else HYBRID_NAME)
        self.task: LocretTask | SeerTask | None = None
        self.start, self.losses = None, []
        self.process, self.processes = 0, 1  # of those that train together

    def release(self) -> None:
        """Gives the model back for use: heads stay on, everything that training put there goes."""
        for hook in self.hooks:
            hook.remove()
        for module in self.modules_with_heads:
            module.__dict__.pop("head_student", None)
            module.__dict__.pop("head_rotation", None)
            self._head(module).to(compute_dtype(self.model)).requires_grad_(False)
        self.model.set_attn_implementation(self.previous_attention)
        self.model.eval()

    def begin_step(self, step: int) -> None:
        """Nothing depends on the step."""

    def forward(self, input_ids, labels=None, start=None, mask=None) -> dict[str, torch.Tensor]:
        """The loss of a batch and what it is made of: means over layers, of smoothness a sum.

        Args:
            input_ids, labels, start, mask: [B, T], see ``PackedTexts``; the text alone is learnt from, not the labels.
        """
        settings, documents = self.settings, Documents.of(input_ids, start, mask)
        if settings.method == "locret":
            self.task = LocretTask(documents, settings.share, settings.smoothness, settings.compile)
        else:
            self.task = SeerTask(documents, settings.block_size, settings.share, compile=settings.compile)
        self.model.eval()  # nothing is dropped
        for module in self.modules_with_heads:
            self._head(module).train()
        self.start, self.losses = documents.start if bool((documents.start != 0).any()) else None, []
        with torch.no_grad():
            decoder_of(self.model)(input_ids=input_ids, position_ids=documents.position, use_cache=False)
        losses = {name: torch.stack([layer[name] for layer in self.losses]) for name in self.losses[0]}
        self.task, self.losses = None, []
        if settings.method == "locret":
            means = {"regression": losses["regression"].mean(), "smoothness": losses["smoothness"].sum()}
            loss = means["regression"] + settings.smoothness * means["smoothness"]
        else:
            means = {name: t.mean() for name, t in losses.items()}
            loss = means["distillation"]
        return {"loss": loss, **{name: value.detach() for name, value in means.items()}}

    def learn(self, module, q, k, scaling, softcap, s_aux) -> None:
        """What a layer's head has to learn from the layer's rotated queries and keys."""
        head = self._head(module)
        with torch.enable_grad():
            if self.settings.method == "locret":
                target = self.task.target(q, k, scaling, softcap)
                self.losses.append(self.task.losses(head.take(k.shape[2]), target))
            else:
                q_plain, k_plain = before_rotation(module, q, k, *module.__dict__["head_rotation"])
                self.losses.append(self.task.losses(head, q, k, q_plain, k_plain, scaling, softcap, s_aux))

    def head_parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules_with_heads for p in self._head(module).parameters()]

    def _head(self, module) -> nn.Module:
        return getattr(module, PLACES[self.settings.method])


def before_rotation(module, q, k, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys turned back by the model's own code, fp32.

    Raises:
        ValueError: a model that rotates in a way that is not known here.
    """
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    q, k, cos, sin = q.float(), k.float(), cos.float(), sin.float()
    length = cos * cos + sin * sin  # some models scale by their rotation
    back = cos / length, -sin / length
    try:
        try:
            return apply(q, k, *back)
        except RuntimeError:  # the model hands over only the dimensions that it turns
            R = cos.shape[-1]
            turned = apply(q[..., :R], k[..., :R], *back)
            return torch.cat([turned[0], q[..., R:]], -1), torch.cat([turned[1], k[..., R:]], -1)
    except (TypeError, RuntimeError, ValueError) as error:
        name = type(module).__name__
        raise ValueError(f"{name} does not rotate its keys in a way that is known here: {error}") from None


def _take_rotation(module, args, kwargs):
    rotation = kwargs.get("position_embeddings")
    if rotation is None and module.__dict__["head_student"].settings.method != "locret":
        raise ValueError(f"{type(module).__name__} does not rotate its keys in a way that is known here")
    module.__dict__["head_rotation"] = rotation


def _attention(module, query, key, value, mask, dropout=0.0, scaling=None, softcap=None, s_aux=None, **kwargs):
    """The model's attention, within documents; layers without heads run as they always do."""
    student = module.__dict__.get("head_student")
    if student is None:
        return trimkv_attention(module, query, key, value, mask, dropout, scaling, softcap, s_aux, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    student.learn(module, query, key, scaling, softcap, s_aux)
    no_decay = key.new_zeros(key.shape[:3], dtype=torch.float32)
    out = decayed_attention(query, key, value, no_decay, scaling, student.start, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


class HeadTrainer(GateTrainer):
    """Trains the heads of a ``HeadStudent``; checkpoints hold heads, optimizer and schedule, never the model."""

    trains = "heads"

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            settings = self.settings
            self.optimizer = torch.optim.AdamW(
                self.model.head_parameters(),
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                betas=settings.betas,
                eps=settings.epsilon,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None and self.settings.schedule == "linear":
            warmup = self.settings.warmup_steps
            self.lr_scheduler = get_scheduler("linear", optimizer or self.optimizer, warmup, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model):
        if self.settings.clip_value is None:
            return super()._clip_grad_norm(model)
        parameters = self.model.head_parameters()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        nn.utils.clip_grad_value_(parameters, self.settings.clip_value)
        return norm

    def _save_final(self, output):
        self._write(output, torch.float16)

    def _write(self, folder, dtype=None) -> None:
        meta = {**self.meta, **self.provenance()}
        save_heads(self.model.model, folder, self.settings.method, dtype, overwrite=True, **meta)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        heads = load_heads(resume_from_checkpoint)
        for module in self.model.modules_with_heads:
            getattr(module, PLACES[heads.kind]).load_state_dict(heads.layers[module.layer_idx])


def train_heads(
    model,
    dataset,
    config: HeadConfig,
    output: str | Path,
    heads: HeadSet | None = None,
    resume: bool = False,
    meta: dict | None = None,
    callbacks=(),
    overwrite: bool = False,
) -> dict:
    """Trains the heads of a baseline for a model and writes them to a folder.

    Args:
        model: a transformers decoder model, on its device. Its weights are frozen, and stay as they are.
        dataset: samples as ``PackedTexts`` gives them.
        config: the training's numbers: ``HeadConfig.locret()`` or ``HeadConfig.seer_attention_r()``.
        output: folder for heads.safetensors, heads.json, training.json and checkpoints.
        heads: to start from; None starts with new ones.
        resume: go on from the last checkpoint in ``output``.
        meta: provenance for heads.json, such as the data's names.
        overwrite: replace a training, or heads, that ``output`` holds.

    Returns:
        method, steps, tokens, seconds, tokens_per_second, the final losses (means of the last ten steps), output,
        history (one entry per step of this run).

    Raises:
        ValueError: nothing to resume from, or another training's checkpoint; heads that do not fit; a folder that holds
            heads or a training already.
        SaveError: a checkpoint or the result could not be written.
    """
    checkpoint = place(output, resume, overwrite)
    reason = why_unserved(model)
    if reason is not None:
        raise ValueError(f"heads can't be trained for {type(model).__name__}: it {reason}")
    made = made_of(model, dataset, config, config.method, (meta or {}).get("base_model"), heads)
    if checkpoint is not None:
        run_folder.check_same(checkpoint, made)
        heads = load_heads(checkpoint)
    if heads is None:
        heads = new_heads(model, config.method, config.width, config.block_size, config.seed)
    if heads.kind != config.method:
        raise ValueError(f"heads in {heads.source} are of {heads.kind}, the training is of {config.method}")
    attach_heads(model, heads)
    student = HeadStudent(model, config)
    names = ("regression", "smoothness") if config.method == "locret" else ("kl", "distillation")
    arguments = student, config, output, dataset, meta or {}, made, callbacks
    return {"method": config.method, **fit(HeadTrainer, arguments, checkpoint, names)}
