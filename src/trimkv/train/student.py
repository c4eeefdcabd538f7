"""One frozen model as teacher and student: the same weights, with and without what the gates do to attention."""

import functools
import math

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..attention.decay import decayed_attention
from ..attention.register import trimkv_attention
from ..attention.retention_sum import retention_sum
from ..attention.soft_eviction import soft_eviction_attention
from ..hf.model import compute_dtype, decoder_of, full_attention_modules
from .capture import CapturedStep
from .config import GateConfig
from .losses import capacity_loss, combine, distillation_losses, logits_of, occupancy

# Two names: transformers makes a T x T mask for a name that has a mask function, which only hybrid models need.
NAME, HYBRID_NAME = "trimkv_train", "trimkv_train_hybrid"


class Student(nn.Module):
    """Computes the loss of a batch. Only the gates have gradients.

    Args:
        model: a transformers decoder model with gates attached.
        config: the training's numbers.
    """

    def __init__(self, model, config: GateConfig):
        super().__init__()
        self.project = logits_of(model)
        self.model, self.settings = model, config
        self.modules_with_gates = list(full_attention_modules(model).values())
        if not all(hasattr(module, "retention_gate") for module in self.modules_with_gates):
            raise ValueError(f"{type(model).__name__} has no retention gates: call trimkv.attach first")
        model.requires_grad_(False)
        self.hooks, self.previous_attention = [], model.config._attn_implementation
        for module in self.modules_with_gates:
            # fp32 masters whatever the model's dtype: steps are far smaller than bf16's grid
            module.retention_gate.float().requires_grad_(True)
            module.__dict__["student"] = self
            self.hooks.append(module.register_forward_pre_hook(_take_hidden_states, with_kwargs=True))
        AttentionInterface.register(NAME, _attention)
        AttentionInterface.register(HYBRID_NAME, _attention)
        AttentionMaskInterface.register(HYBRID_NAME, sdpa_mask)
        text = model.config.get_text_config(decoder=True)
        model.set_attn_implementation(NAME if len(self.modules_with_gates) == text.num_hidden_layers else HYBRID_NAME)
        if config.checkpointing:
            model.gradient_checkpointing_enable(
                {"use_reentrant": False}
            )  # the other kind drops the capacity's gradient
        if config.compile:
            for layer in decoder_of(model).layers:
                layer.compile(dynamic=False)  # all but attention and gates, which are kernels already
        self.teaching, self.start = False, None
        self.log_beta, self.collecting = {}, False  # of each layer, from the student's forward pass
        self.budget_B, self.temperature_now, self.temperature = None, None, config.temperatures[0]
        self.captured: CapturedStep | None = None
        self.draws = torch.Generator()
        self.process, self.processes = 0, 1  # of those that train together

    def release(self) -> None:
        """Gives the model back for use: gates stay on, everything that training put there goes."""
        self.captured = None
        for layer in decoder_of(self.model).layers if self.settings.compile else ():
            layer._compiled_call_impl = None
        for hook in self.hooks:
            hook.remove()
        for module in self.modules_with_gates:
            module.__dict__.pop("student", None)
            module.__dict__.pop("student_log_beta", None)
            module.retention_gate.to(compute_dtype(self.model)).requires_grad_(False)
        self.model.gradient_checkpointing_disable()
        self.model.set_attn_implementation(self.previous_attention)
        self.model.eval()

    def begin_step(self, step: int) -> None:
        """Sets what depends on the step alone, so that a resumed training goes on as it would have."""
        self.draws.manual_seed(self.settings.seed * 1_000_003 + step)
        first, last = self.settings.temperatures
        self.temperature = first * (last / first) ** (step / self.settings.steps)

    def forward(self, input_ids, labels=None, start=None, mask=None) -> dict[str, torch.Tensor]:
        """The loss of a batch and what it is made of.

        Args:
            input_ids, labels, start, mask: [B, T], see ``PackedTexts``.

        Returns:
            loss, one entry per base loss, capacity, and occupancy (retained mass over budget).
        """
        inputs = {"input_ids": input_ids, "labels": input_ids if labels is None else labels}
        if self.settings.stage == "eviction":
            inputs["budget_B"] = self._draw_budgets(input_ids)
            inputs["temperature"] = torch.tensor(self.temperature, device=input_ids.device)
        if mask is not None:
            inputs["mask"] = mask
        if self.settings.cuda_graph and input_ids.is_cuda and torch.is_grad_enabled():
            inputs["start"] = torch.zeros_like(input_ids) if start is None else start
            if self.captured is None:
                weights, biases = self.gate_parameters()
                self.captured = CapturedStep(functools.partial(self._losses, static=True), weights + biases)
            return self.captured(inputs)
        if start is not None and bool((start != 0).any()):
            inputs["start"] = start
        return self._losses(**inputs)

    def _losses(self, input_ids, labels, start=None, mask=None, budget_B=None, temperature=None, static=False):
        settings = self.settings
        self.start, self.budget_B, self.temperature_now = start, budget_B, temperature
        position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if start is not None:
            position = position - start
        inputs = {"input_ids": input_ids, "position_ids": position, "use_cache": False}
        decoder = decoder_of(self.model)
        self.teaching = True
        with torch.no_grad():
            teacher = decoder(**inputs).last_hidden_state
        self.teaching, self.log_beta, self.collecting = False, {}, True
        student = decoder(**inputs).last_hidden_state
        self.collecting = False  # what is recomputed in backward would hold its graph
        sums = retention_sum(torch.cat([self.log_beta[i] for i in sorted(self.log_beta)], 1), start)
        weight = None if budget_B is None else (budget_B / 128) ** settings.budget_power
        kinds = settings.losses
        losses = distillation_losses(student, teacher, self.project, labels, kinds, weight_B=weight, static=static)
        capacity = capacity_loss(sums, settings.budget, start, mask, settings.normaliser, settings.scope)
        loss = combine(losses, capacity, settings.capacity_weight, settings.average_losses)
        log = {**losses, "capacity": capacity, "occupancy": occupancy(sums, settings.budget, mask)}
        return {"loss": loss, **{name: value.detach() for name, value in log.items()}}

    def _draw_budgets(self, input_ids) -> torch.Tensor:
        low, high = (math.log(budget) for budget in self.settings.budgets)
        # Every process draws for all, and takes its own: together they have what one process with accumulation has.
        share = torch.rand(self.processes, input_ids.shape[0], generator=self.draws)[self.process]
        return torch.exp(low + share * (high - low)).to(input_ids.device)

    def gate_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(weights, output biases)."""
        gates = [module.retention_gate for module in self.modules_with_gates]
        weights = [p for gate in gates for name, p in gate.named_parameters() if name != "bias"]
        return weights, [gate.bias for gate in gates]


@torch.compiler.disable
def _take_hidden_states(module, args, kwargs):
    student = module.__dict__["student"]
    if not student.teaching and not module.retention_gate.reads_keys:
        module.__dict__["student_log_beta"] = module.retention_gate(kwargs["hidden_states"])


@torch.compiler.disable
def _attention(module, query, key, value, mask, dropout=0.0, scaling=None, softcap=None, s_aux=None, **kwargs):
    """Attention of a teacher's or a student's layer; layers without gates run as they always do."""
    student = module.__dict__.get("student")
    if student is None:
        return trimkv_attention(module, query, key, value, mask, dropout, scaling, softcap, s_aux, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if student.teaching:
        log_beta = key.new_zeros(key.shape[:3], dtype=torch.float32)
    else:
        reads_keys = module.retention_gate.reads_keys
        log_beta = module.retention_gate(key, value) if reads_keys else module.__dict__.pop("student_log_beta")
        if student.collecting:
            student.log_beta[module.layer_idx] = log_beta
    if student.budget_B is not None and not student.teaching:
        if softcap is not None or s_aux is not None:
            raise ValueError("the eviction stage does not know softcap and attention sinks; use stage decay")
        budget_B = student.budget_B * module.retention_gate.share
        out = soft_eviction_attention(
            query, key, value, log_beta, scaling, budget_B, student.temperature_now, student.start
        )
    else:
        out = decayed_attention(query, key, value, log_beta, scaling, student.start, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None
