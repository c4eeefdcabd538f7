"""Decoder layers as a handful of launches, for decode steps of a static cache.

A layer of the common shape (RMSNorm, projections, rotation, attention, RMSNorm, gated feed-forward block) becomes six
or seven launches over the weights of the stock modules, which stay where they are. Whether a model has that shape is
not taken from its name: its modules must look like it, and then every layer must give what the launches' reference
gives, for a few random tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..attention import reference, slots
from ..attention.register import NAME, observed_by, register
from ..hf.calls import cache_in, with_cache
from ..hf.model import decoder_of
from ..hf.substitute import stock, substituted
from ..linear import products
from ..linear.products import Normed
from ..ranks import ranks_of
from .beginning import Beginning, recognise_beginning
from .bounded import BoundedCache
from .fused import projected_kernels

LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
EXTRAS = {"q_norm", "k_norm", "retention_gate", "retaining_head", "attn_gate"}  # what else an attention may hold
COUNTERS = 4096  # tiles of the largest product whose columns are split
# Relative RMS of what a layer adds to its input; another norm, order or factor is off by a tenth at least.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


class NotRecognised(ValueError):
    """A model that fused layers cannot serve; says why."""


@dataclass
class Norm:
    """An RMSNorm whose weight is a plain factor."""

    weight: torch.Tensor
    eps: float

    @classmethod
    @torch.no_grad()
    def of(cls, module, name: str) -> "Norm":
        """Recognises it by what it computes.

        Raises:
            NotRecognised: it is another norm.
        """
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if weight is None or weight.ndim != 1 or getattr(module, "bias", None) is not None or not eps:
            raise NotRecognised(f"{name} is a {type(module).__name__}, not an RMSNorm with a weight")
        x = _random(weight, 4, len(weight))
        expect = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps) * weight.float()
        if reference.relative_error(module(x), expect) > TOLERANCE[x.dtype]:
            raise NotRecognised(f"{name}, a {type(module).__name__}, is no RMSNorm whose weight is a plain factor")
        return cls(weight, eps)


@dataclass
class Layer:
    """The weights of one decoder layer, as its launches take them."""

    index: int
    attention: nn.Module
    heads: tuple[int, int, int]  # Q, H, D
    scaling: float
    first_norm: Norm
    second_norm: Norm
    head_norms: tuple[torch.Tensor | None, torch.Tensor | None, float]
    projections: tuple[list, list]  # weights and biases of q, k, v
    output: tuple[list, list]
    feed_forward: tuple[list, list]  # gate and up
    down: tuple[list, list]

    @property
    def gate(self):
        """The layer's retention gate if it reads hidden states; it may be put on anew at any time."""
        gate = getattr(self.attention, "retention_gate", None)
        return None if gate is None or gate.reads_keys else gate

    def attend(self, x: Normed, cos, sin, whole: BoundedCache, counters) -> torch.Tensor:
        """From the normed input to what the heads give, [B, Q D]."""
        Q, H, D = self.heads
        cache = whole.layers[self.index]
        gate = self.gate if "log_beta" in cache.policy.needs else None
        weights, biases = self.projections
        activation, second = products.PLAIN, None
        if gate is not None:
            weights, biases = [*weights, gate.linear1.weight], [*biases, gate.linear1.bias]
            activation, second = products.SILU_LAST, (gate.linear2.weight, gate.bias)
        qkv = products.linear(x, weights, biases, activation, counters=counters)
        kernels = self._from_projections(cache, gate)
        if kernels is not None:
            return cache.decode_projected(kernels, qkv, Q, (cos, sin), self.head_norms, second, self.scaling)
        q, k, log_beta = products.heads(qkv, Q, H, D, cos, sin, *self.head_norms, second)
        v = qkv[:, (Q + H) * D : (Q + 2 * H) * D].unflatten(1, (H, D))
        if log_beta is not None:
            cache.stage_log_beta(log_beta[:, :, None])
        k, v = cache.update(k[:, :, None], v[:, :, None])
        return cache.attend(self.attention, q[:, :, None], k, v, self.scaling).flatten(1)

    def _from_projections(self, cache, gate):
        """The kernels that need no queries and keys to be made for them, if they can serve."""
        if cache.ahead is None or "log_beta" in cache.policy.needs and gate is None:
            return None
        return projected_kernels(self.heads[0], cache.store.k)

    def finish(self, out_BN: torch.Tensor, residual_BE: torch.Tensor, following: Norm, counters):
        """All after attention. Returns [B, E] and the same for the next norm."""
        norm = self.second_norm.weight, self.second_norm.eps
        x, normed = products.linear(out_BN, *self.output, residual_BN=residual_BE, norm=norm, counters=counters)
        hidden = products.linear(normed, *self.feed_forward, products.GATED, counters=counters)
        norm = following.weight, following.eps
        return products.linear(hidden, *self.down, residual_BN=x, norm=norm, counters=counters)


@dataclass
class FusedLayers:
    """A recognised model. ``running`` puts the launches in the layers' place and takes them off again."""

    model: nn.Module
    layers: list[Layer]
    last_norm: Norm
    counters: torch.Tensor
    beginning: Beginning | None = None  # None: the decoder's own code embeds and rotates
    _handed: tuple | None = field(default=None, repr=False)  # what a layer leaves for the next one

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, forwards of this thread, of one token per row with a static cache, are fused; others are errors.
        Other threads may call the model as it is."""
        decoder, head = decoder_of(self.model), self.model.get_output_embeddings()
        places = [(module, self._layer(i)) for i, module in enumerate(decoder.layers)]
        if self.beginning is not None:
            places.append((decoder, self._decoder(stock(decoder))))
        if head is not None:
            places += [(decoder.norm, self._norm), (head, self._head)]
        try:
            with substituted(places):
                yield
        finally:
            self._handed = None

    def _following(self, i: int) -> Norm:
        return self.layers[i + 1].first_norm if i + 1 < len(self.layers) else self.last_norm

    def _decoder(self, plain):
        def forward(input_ids=None, position_ids=None, **kwargs):
            cache = cache_in((), kwargs)
            ahead = cache.ahead
            if input_ids is None or position_ids is None or ahead is None or ahead.real is None:
                return plain(input_ids=input_ids, position_ids=position_ids, **kwargs)
            assert input_ids.shape[1] == 1, "fused layers do decode steps"
            first = self.layers[0].first_norm
            position = position_ids.expand(len(input_ids), 1)[:, 0]
            x, normed, (cos, sin), (ahead.slot, ahead.now) = self.beginning.step(
                *(input_ids[:, 0], position, ahead.real[:, 0], (first.weight, first.eps)),
                *(ahead.seen, ahead.next_slot),
            )
            for i, layer in enumerate(self.layers):
                out = layer.attend(normed, cos, sin, cache, self.counters)
                x, normed = layer.finish(out, x, self._following(i), self.counters)
            self._handed = x, normed
            return BaseModelOutputWithPast(last_hidden_state=self._norm(x), **with_cache(self.model, cache))

        return forward

    def _layer(self, i: int):
        layer, following = self.layers[i], self._following(i)

        def forward(hidden_states, *args, position_embeddings=None, **kwargs):
            assert hidden_states.shape[1] == 1, "fused layers do decode steps"
            x = hidden_states[:, 0]
            if i == 0:
                normed = products.norm_input(x, layer.first_norm.weight, layer.first_norm.eps)
            else:
                mine, normed = self._handed
                assert mine.data_ptr() == x.data_ptr(), "something between two layers has changed what they hand on"
            cos, sin = (one.expand(len(x), -1, -1)[:, 0] for one in position_embeddings)
            out = layer.attend(normed, cos, sin, cache_in(args, kwargs), self.counters)
            self._handed = layer.finish(out, x, following, self.counters)
            return self._handed[0][:, None]

        return forward

    def _norm(self, hidden_states):
        return self._handed[1].x[:, None]  # scaled by the head

    def _head(self, hidden_states):
        normed, head = self._handed[1], self.model.get_output_embeddings()
        assert normed.x.data_ptr() == hidden_states.data_ptr() and hidden_states.shape[1] == 1
        return products.linear(normed, [head.weight], [head.bias], counters=self.counters)[:, None]


@torch.no_grad()
def recognise(model, policy=None) -> FusedLayers:
    """Looks whether a model's layers have the common shape. Runs each of them on a few tokens: waits for the device.

    Args:
        policy: of the cache that will be used; one with a trained head of its own reads what fused layers do not make.

    Raises:
        NotRecognised: the model has another shape; the message says in what.
    """
    name = type(model).__name__
    if ranks_of(model) is not None:
        raise NotRecognised(f"{name} is sharded over processes, whose sums its launches would leave out")
    if policy is not None and policy.head:
        raise NotRecognised(f"policy {policy.name} reads projections before their rotation")
    try:
        return _recognise(model)
    except NotRecognised as error:
        raise NotRecognised(f"{name}: {error}") from None


def _recognise(model) -> FusedLayers:
    decoder, head = decoder_of(model), model.get_output_embeddings()
    for part in ("layers", "norm", "rotary_emb"):
        if not hasattr(decoder, part):
            raise NotRecognised(f"its decoder has no {part}")
    if head is not None:
        _linear(head, "the output layer")
    layers = [_layer(i, module) for i, module in enumerate(decoder.layers)]
    last_norm = Norm.of(decoder.norm, "the last norm")
    weights = [*(w for one in layers for w in one.projections[0]), last_norm.weight]
    first = weights[0]
    reason = products.unsupported(first) if first.is_cuda else None
    if reason:
        raise NotRecognised(reason)
    if any(w.dtype != first.dtype or w.device != first.device for w in decoder.parameters()):
        raise NotRecognised("its weights are of several dtypes or on several devices")
    _check_layers(model, decoder, layers)
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device=first.device)
    beginning = None if head is None else recognise_beginning(decoder, layers[0].heads[2])
    return FusedLayers(model, layers, last_norm, counters, beginning)


def _layer(i: int, module) -> Layer:
    name = f"layer {i}"
    children = {child for child, _ in module.named_children()}
    if children != LAYER:
        raise NotRecognised(f"{name} consists of {', '.join(sorted(children))}")
    attention, mlp = module.self_attn, module.mlp
    children = {child for child, _ in attention.named_children()}
    if not ATTENTION <= children or children - ATTENTION - EXTRAS:
        raise NotRecognised(f"{name} has an attention of {', '.join(sorted(children))}")
    if not all(isinstance(getattr(mlp, part, None), nn.Linear) for part in ("gate_proj", "up_proj", "down_proj")):
        raise NotRecognised(f"{name} has a {type(mlp).__name__} without gate_proj, up_proj and down_proj")
    _refuse_hooks(name, module)
    D = getattr(attention, "head_dim", None)
    if not D or D % 2:
        raise NotRecognised(f"{name} has heads of {D} dimensions")
    q, k, v, o = (_linear(getattr(attention, f"{x}_proj"), f"{x}_proj of {name}") for x in "qkvo")
    gate, up, down = (_linear(getattr(mlp, f"{x}_proj"), f"{x}_proj of {name}") for x in ("gate", "up", "down"))
    Q, H = q.out_features // D, k.out_features // D
    if v.out_features != H * D or Q * D != q.out_features or H * D != k.out_features or Q % H:
        raise NotRecognised(f"{name} has values of another shape than its keys")
    _check_gate(name, attention)
    return Layer(
        index=attention.layer_idx,
        attention=attention,
        heads=(Q, H, D),
        scaling=attention.scaling,
        first_norm=Norm.of(module.input_layernorm, f"the input norm of {name}"),
        second_norm=Norm.of(module.post_attention_layernorm, f"the second norm of {name}"),
        head_norms=_head_norms(name, attention, D),
        projections=_weights(q, k, v),
        output=_weights(o),
        feed_forward=_weights(gate, up),
        down=_weights(down),
    )


def _linear(module, name: str) -> nn.Linear:
    weight = getattr(module, "weight", None)
    if type(module) is not nn.Linear or type(weight.data) is not torch.Tensor or weight.stride(1) != 1:
        raise NotRecognised(f"{name} is a {type(module).__name__}, not a plain torch.nn.Linear")
    return module


def _weights(*modules) -> tuple[list, list]:
    return [module.weight for module in modules], [module.bias for module in modules]


def _head_norms(name: str, attention, D: int):
    norms = [getattr(attention, f"{x}_norm", None) for x in "qk"]
    if norms == [None, None]:
        return None, None, 0.0
    q, k = (Norm.of(norm, f"the {x} norm of {name}") for x, norm in zip("qk", norms, strict=True))
    if len(q.weight) != D or len(k.weight) != D or q.eps != k.eps:
        raise NotRecognised(f"{name} norms queries and keys otherwise than head by head")
    return q.weight, k.weight, q.eps


def _check_gate(name: str, attention) -> None:
    gate = getattr(attention, "retention_gate", None)
    if gate is None or gate.reads_keys:
        return  # attention calls it itself
    x = _random(gate.bias, 8).float()
    if not torch.allclose(gate.activation(x), nn.functional.silu(x), atol=1e-6):
        raise NotRecognised(f"{name} has a gate whose activation is not SiLU")


def _refuse_hooks(name: str, module) -> None:
    """Fused layers call no module: what listens to one would hear nothing. Our own hooks are seen to."""
    for inner, part in module.named_modules():
        if not inner:
            continue
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for hook in hooks.values():
                if not getattr(hook, "__module__", "").startswith("trimkv."):
                    raise NotRecognised(f"{inner} of {name} has a forward hook, which would not be called")


class _Probe:
    """An attention function that remembers what it was given."""

    def __call__(self, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        self.given, self.scaling = (query, key, value), scaling
        self.plain = softcap is None and s_aux is None and scaling is not None
        return slots.attend_causal(query, key, value, scaling or 1.0).transpose(1, 2).contiguous(), None


@torch.no_grad()
def _check_layers(model, decoder, layers: list[Layer]) -> None:
    """Three random tokens through each stock layer and through the launches' reference: queries, keys and values must
    agree, and what both add to their input."""
    weight = layers[0].first_norm.weight
    T, dtype = 3, weight.dtype
    # Small beside what a layer adds, so that the sum's rounding hides nothing.
    x = 0.1 * _random(weight, 1, T, len(weight))
    position = torch.tensor([[1, 6, 40]], device=weight.device)
    cos, sin = decoder.rotary_emb(x, position)
    before, probe = decoder.config._attn_implementation, _Probe()
    if before != NAME:
        decoder.set_attn_implementation(register())
    try:
        for i, (module, layer) in enumerate(zip(decoder.layers, layers, strict=True)):
            if cos.shape != (1, T, layer.heads[2]):
                raise NotRecognised(f"layer {i} rotates {cos.shape[-1]} of {layer.heads[2]} dimensions")
            with observed_by(probe):
                expect = module(x, attention_mask=None, position_ids=position, position_embeddings=(cos, sin))
            expect = expect[0] if isinstance(expect, tuple) else expect
            if not probe.plain or probe.scaling != layer.scaling:
                raise NotRecognised(f"layer {i} has an attention with more than a scaling")
            got, given = _reference(layer, x[0], cos[0], sin[0])
            added = got - x[0].float(), expect[0].float() - x[0].float()
            for a, b in (*zip(given, probe.given, strict=True), added):
                error = reference.relative_error(a, b)
                if error > TOLERANCE[dtype]:
                    what = "computes something else than its modules suggest"
                    raise NotRecognised(f"layer {i} {what} (relative difference {error:.2g})")
    finally:
        if before != NAME:
            decoder.set_attn_implementation(before)


def _reference(layer: Layer, x_TE, cos_TD, sin_TD) -> tuple[torch.Tensor, tuple]:
    """The layer over tokens of one row, by the operators' references and plain causal attention; and its q, k and v."""
    Q, H, D = layer.heads

    def linear(x, parts, activation=products.PLAIN, residual=None, normed=None):
        weights, biases = parts
        given = [b for b in biases if b is not None], [b is not None for b in biases]
        squares, eps = normed or (None, 0.0)
        return products.linear_reference(x, weights, *given, squares, eps, activation, residual, None, None)[0]

    def norm(x, one: Norm):
        x, squares = products.norm_input_reference(x, one.weight)
        return x, (squares, one.eps)

    x, normed = norm(x_TE, layer.first_norm)
    qkv = linear(x, layer.projections, normed=normed)
    qk, _ = products.heads_reference(qkv, Q, H, D, cos_TD, sin_TD, *layer.head_norms, None, None)
    v = qkv[:, (Q + H) * D :].unflatten(1, (H, D))
    q, k, v = (one.transpose(0, 1)[None] for one in (qk[:, :Q], qk[:, Q:], v))
    out = slots.attend_causal(q, k, v, layer.scaling)[0].transpose(0, 1).flatten(1)
    y = linear(out, layer.output, residual=x_TE)
    x, normed = norm(y, layer.second_norm)
    hidden = linear(x, layer.feed_forward, products.GATED, normed=normed)
    return linear(hidden, layer.down, residual=y).float(), (q, k, v)


def _random(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Normal numbers, the same every time; the user's generators are left alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
