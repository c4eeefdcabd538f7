"""What each token would have attended to in a bounded cache that is fed token by token, found for a whole sequence in
one forward pass: what was kept at its step, or, of a policy that keeps everything, what it selected."""

from collections.abc import Callable

import torch

from ..attention import slots as attention
from ..budget import Budget
from .bounded import BoundedCache
from .build import bounded_cache
from .graph import WARM_UP
from .layers import BoundedLayer
from .policies import Policy
from .slots import NewTokens, Slots

FEW = 32  # steps that are not worth a capture
QUERIES = 128  # that attend together: a mask is [B, H, 128, M + 128], or as wide as what is kept, never T x T


def replayable(policy: Policy, budget: Budget) -> bool:
    """Whether what a layer's queries see can be known before its attention runs: scores without later queries, keys
    seen where they are, selections that later tokens do not change, no buffer, no budget that heads share."""
    late = policy.selects and not policy.selects_at_once
    stepwise = policy.observes or policy.moves_keys or policy.grows or late
    return not stepwise and budget.buffer == 0 and not budget.shared


def replay_cache(model, policy: str | Policy, budget: int | Budget) -> BoundedCache:
    """A cache for one forward pass over whole sequences, of equal length and without padding, in which every position
    attends to what it would attend to if the tokens came one by one.

    Raises:
        ValueError: as ``bounded_cache``; or a policy or budget that is not ``replayable``.
    """
    cache = bounded_cache(model, policy, budget)
    for layer in cache.slot_layers:
        if not replayable(layer.policy, layer.budget):
            raise ValueError(f"policy {layer.policy.name} with {layer.budget} must be fed token by token")
    return BoundedCache(
        [
            ReplayLayer(layer.policy, layer.budget, None, layer.layer_idx, layer.facts.rotation)
            if isinstance(layer, BoundedLayer)
            else layer
            for layer in cache.layers
        ]
    )


class ReplayLayer(BoundedLayer):
    """A ``BoundedLayer`` that takes all tokens at once and stores none.

    Attributes:
        last: int32 [B, H, T], the last step at which each token is attended to: token j is seen by queries j..last[j].
            None where the policy selects: each query sees its own choice.
        on_attended: called when the layer is through.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.last: torch.Tensor | None = None
        self.on_attended: Callable[[], None] = lambda: None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @torch.no_grad()
    def attend(self, module, q, k, v, scaling, softcap=None, s_aux=None) -> torch.Tensor:
        """Attention of all T queries, each over what its step would have found in the slots. Returns [B, Q, T, D]."""
        T = k.shape[2]
        if self.real is not None or self.columns != T:
            raise ValueError("a replay takes whole sequences without padding, in one forward pass")
        self.waiting = 0
        log_beta = self._take_log_beta(module, k, v) if "log_beta" in self.policy.needs else None
        position = torch.arange(T, dtype=torch.int32, device=k.device).expand(*k.shape[:3])
        self._note(q, k, scaling, softcap, s_aux)
        tokens = NewTokens(k, v, position, {}, self.facts, self._rows(q, k), q, log_beta, module)
        state = self.policy.new_state(tokens)
        tokens.state = {name: state[name].to(dtype) for name, dtype in self.policy.state.items()}
        M, selects = self.budget.tokens if self.policy.bounded else T, self.policy.selects
        if M >= T and not selects:  # nothing is ever evicted
            self.last = torch.full_like(position, T - 1)
            self.peak_decode_tokens = max(self.peak_decode_tokens, T)
            self.on_attended()
            return attention.attend_causal(q, k, v, scaling, softcap, s_aux)
        self.last = None if selects else last_steps(tokens, self.policy, M, self.sinks, self.recent)
        out, peaks = [], []
        for start in range(0, T, QUERIES):
            end = min(start + QUERIES, T)
            if selects:
                part, mask = _selected_by(tokens, self.policy, start, end)
            else:
                part, mask = _seen_by(tokens, self.last, start, end, M)
                peaks.append(mask.sum(-1).amax())
            out.append(attention.attend(q[:, :, start:end], part.k, part.v, mask, scaling, softcap, s_aux))
        peak = self._attended(T) if selects else int(torch.stack(peaks).amax())
        self.peak_decode_tokens = max(self.peak_decode_tokens, peak)
        self.on_attended()
        return torch.cat(out, 2)

    def _rows(self, q: torch.Tensor, k: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the policy keeps per sequence, for a new one of T tokens: name -> zeros [B, ...]."""
        B, H, T, D = k.shape
        rows = self.policy.row_state(q.shape[1], H, D)
        return {name: torch.zeros(B, *r.shape_for(T), dtype=r.dtype, device=k.device) for name, r in rows.items()}


def last_steps(tokens: Slots, policy: Policy, M: int, sinks: int = 0, recent: int = 0) -> torch.Tensor:
    """The last step at which each of T tokens is attended to, int32 [B, H, T]; T - 1 for those never evicted.

    Plays ``BoundedLayer``'s decoding through without attention: M slots per head, and from step M on the new token
    takes the victim's. Only what the policy reads moves; the host reads nothing.
    """
    T = tokens.position.shape[2]
    last = torch.full_like(tokens.position, T - 1)
    if M >= T:
        return last
    held = Slots(
        tokens.k[:, :, :M].clone() if "keys" in policy.needs else None,
        tokens.v[:, :, :M].clone() if "values" in policy.needs else None,
        tokens.position[:, :, :M].clone(),
        {name: t[:, :, :M].clone() for name, t in tokens.state.items()},
        tokens.layer,
    )
    moving = [(held.position, tokens.position), *((held.state[name], t) for name, t in tokens.state.items())]
    moving += [(where, t) for where, t in ((held.k, tokens.k), (held.v, tokens.v)) if where is not None]
    evicted = torch.empty_like(tokens.position[:, :, M:])
    turn = torch.full((1,), M, device=evicted.device)  # the arriving token

    def step() -> None:
        now = tokens.position[:, :1].index_select(2, turn)
        recent_from = now - (recent - 1) if recent > 1 else None  # the arriving token is one of the recent
        score = attention.protect(policy.score(held, now), held.position, sinks, recent_from, any_empty=False)
        slot = attention.victim(score, held.position)
        evicted.index_copy_(2, turn - M, held.position.gather(2, slot))
        for where, new in moving:
            at = slot if new.dim() == 3 else slot[..., None].expand(*slot.shape, new.shape[-1])
            where.scatter_(2, at, new.index_select(2, turn))
        turn.add_(1)

    _repeat(step, T - M, evicted.device)
    steps = tokens.position[:, :, M - 1 : T - 1]  # evicted at step t: last seen at t - 1
    return last.scatter(2, evicted.long(), steps)


def _repeat(step: Callable[[], None], times: int, device: torch.device) -> None:
    """Takes a step so many times, whose host knows nothing of which it is; on a GPU captured after the first few."""
    if device.type == "cuda" and times > FEW:
        times -= WARM_UP
        for _ in range(WARM_UP):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        for _ in range(times):
            graph.replay()
        torch.cuda.current_stream(device).synchronize()  # its memory goes with the graph
    else:
        for _ in range(times):
            step()


def _seen_by(tokens: Slots, last: torch.Tensor, start: int, end: int, M: int) -> tuple[Slots, torch.Tensor]:
    """The tokens that any of the queries start..end-1 sees, and which query sees which, bool [B, H, end - start, S].

    No head sees more than M of the tokens before ``start``: those that last longest.
    """
    early = last[:, :, :start].topk(min(M, start), dim=-1).indices
    position = torch.cat([early.int(), tokens.position[:, :, start:end]], 2)
    index = position.long()
    query = tokens.position[:1, :1, start:end, None]
    mask = (position[:, :, None] <= query) & (query <= last.gather(2, index)[:, :, None])
    return Slots(_pick(tokens.k, index), _pick(tokens.v, index), position, {}, tokens.layer), mask


def _selected_by(tokens: NewTokens, policy: Policy, start: int, end: int) -> tuple[Slots, torch.Tensor]:
    """The tokens before ``end``, and which of them the queries start..end-1 select, bool [B, H, end - start, end]."""
    held, new = _part(tokens, slice(end)), _part(tokens, slice(start, end))
    return held, policy.visible(held, new) & attention.position_rule(new.position[:, 0], held.position)


def _part(tokens: NewTokens, part: slice) -> NewTokens:
    k, v, position, q = (t[:, :, part] for t in (tokens.k, tokens.v, tokens.position, tokens.q))
    state = {name: t[:, :, part] for name, t in tokens.state.items()}
    return NewTokens(k, v, position, state, tokens.layer, tokens.rows, q, module=tokens.module)


def _pick(t_BHTD: torch.Tensor, index_BHS: torch.Tensor) -> torch.Tensor:
    return t_BHTD.gather(2, index_BHS[..., None].expand(*index_BHS.shape, t_BHTD.shape[-1]))
