"""The transformers cache layer over a slot store."""

from contextlib import AbstractContextManager, nullcontext

import torch
from transformers.cache_utils import CacheLayerMixin

from ..attention import slots as attention
from ..attention.register import hand_over
from ..attention.slots import NO_TOKEN
from ..budget import Budget
from ..ranks import Part
from . import fused, gradients
from .policies import Policy
from .rotation import Rotation
from .seen import Seen
from .slots import LayerFacts, NewTokens, Slots, SlotStore
from .static import Keys


def places(seen_B: torch.Tensor, real_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tokens to come among which there may be padding: their positions, int32 [B, T], -1 for padding; and how many
    of each row are real, int32 [B]."""
    rank = real_BT.cumsum(-1, dtype=torch.int32)
    return torch.where(real_BT, seen_B[:, None] + rank - 1, NO_TOKEN), rank[:, -1]


class BoundedLayer(CacheLayerMixin):
    """One attention layer's tokens in a fixed number of slots.

    ``update`` receives new keys and values and marks the keys as this layer's. The work is done in ``attend``, which
    the registered attention function calls when it gets marked keys: write, evict, attend. A forward of any length is
    worked off in chunks: no query attends to more than M slots and its chunk, and a single token to no more than M
    (+ buffer).

    After ``allocate`` the layer is static: its slots are there before the first token, and a decode step has shapes and
    launches that depend neither on host numbers nor on what tensors hold, so that it can be captured as a CUDA graph,
    with rows of any age. After ``open`` the same holds for a chunk, unless the policy observes. Peaks are then upper
    bounds.

    Args:
        policy: decides what is worth least.
        budget: tokens per KV head.
        chunk: new tokens that attend together before an eviction; None takes a whole forward as one chunk, which is
            the published timing (a prompt attends in full).
        layer_idx: the layer's number in the model.
        rotation: how it turns keys, for policies that need it.
        part: which of the layer's KV heads are in this process, where a model is sharded.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(
        self,
        policy: Policy,
        budget: Budget,
        chunk: int | None,
        layer_idx: int,
        rotation: Rotation | None = None,
        part: Part | None = None,
    ):
        super().__init__()
        self.policy, self.budget, self.chunk = policy, budget, chunk
        self.sinks = max(budget.sinks, policy.sinks)
        self.facts = LayerFacts(layer_idx, budget.tokens, self.sinks, rotation, part=part)
        self.recent = budget.recent or min(int(policy.recent_share * budget.tokens), budget.tokens - self.sinks - 1)
        self.store: SlotStore | None = None
        self.static: Keys | None = None  # what was allocated beforehand
        self.ahead, self.which = None, 0  # what a static cache's layers have in common (ahead.py), and which of them
        self.peak_prefill_tokens = self.peak_decode_tokens = self.transient_bytes = 0
        self._forget()

    def _forget(self) -> None:
        self.columns = 0  # tokens seen, padding included: what transformers calls the sequence length
        self.padded = False  # rows may hold different numbers of tokens
        self.count = 0  # tokens held per head, an upper bound where rows differ
        self.log_beta: torch.Tensor | None = None  # of the tokens to come, left here by the gate's hook
        self.real: torch.Tensor | None = None  # [B, T] False where a token to come is padding; None = no padding
        self.places: tuple | None = None  # of the tokens to come, if somebody knows them: see ``places``
        self.waiting = 0  # tokens given to update() that no attention has seen yet
        self.more = False  # whether the prompt goes on after the forward to come
        self._touched()

    def _touched(self) -> None:
        """Something but a decode step has changed what is held: where the next token goes must be found anew."""
        self.next_slot: torch.Tensor | None = None  # [B, H], found by the kernel in the step before
        if self.ahead is not None:
            self.ahead.stale = True

    @property
    def layer_idx(self) -> int:
        return self.facts.idx

    def allocate(self, keys: Keys, rows: int) -> None:
        """Makes the layer static: slots for so many rows, all at once."""
        self.static = keys
        self.lazy_initialization(*keys.empty(rows))
        self.store.add_rows(self.policy.row_state(keys.queries, keys.heads, keys.key_dim))

    def restart(self) -> None:
        """What the host knows of an open layer that holds nothing, where the device was told by a graph."""
        self._forget()
        self.store.used = self.store.capacity
        self.open()

    # What the hooks leave for the forward that is about to run.

    def stage_log_beta(self, log_beta_BHT: torch.Tensor) -> None:
        """Takes the retention of the tokens to come, [B, H, T], before their keys arrive; made within ``beside``."""
        self.log_beta = log_beta_BHT

    def beside(self) -> AbstractContextManager:
        """Where a gate's hook computes: nothing waits for it before attention does."""
        return nullcontext() if self.ahead is None else self.ahead.beside()

    def stage_padding(self, real_BT: torch.Tensor | None, places: tuple | None = None) -> None:
        """Takes which of the tokens to come are real (True) and which are padding; None if all are real.

        Args:
            places: what ``places`` says of them, made once for all layers.
        """
        self.real, self.places = real_BT, places
        self.padded |= real_BT is not None

    def stage_more(self, more: bool) -> None:
        """Takes whether the forward to come leaves off before the end of a prompt."""
        self.more = more

    # What transformers' attention modules and generate call.

    @property
    def peak_mean_tokens(self) -> float:
        """The mean over heads of the most tokens that a single token has attended to: all hold equally many."""
        return self.peak_decode_tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        fixed = self.static is not None or self.policy.bounded and not self.policy.grows
        capacity = self.budget.slots if fixed else None
        self.store = SlotStore(capacity, key_states, value_states, self.policy.state, self.facts)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Receives the new keys and values, [B, H, T, D], and hands them on unchanged to the attention of this call."""
        if self.static is not None:
            self._check_static(key_states, value_states)
        if self.store is not None and self.store.seen.shape[0] != key_states.shape[0]:
            if self.columns:
                raise ValueError(
                    f"the cache holds {self.store.seen.shape[0]} rows and got {key_states.shape[0]}; "
                    "use a new cache, or batch_select_indices / batch_repeat_interleave on this one"
                )
            self.store = None
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        if self.waiting:
            raise RuntimeError(
                "keys reached the bounded cache but no attention used them: this model doesn't give what the cache "
                "returns to transformers' AttentionInterface, or an earlier forward broke off"
            )
        self.waiting = key_states.shape[2]
        self.columns += self.waiting
        return hand_over(key_states, self), value_states

    def _check_static(self, k, v) -> None:
        rows = self.store.seen.shape[0]
        if k.shape[0] != rows:
            raise ValueError(f"this cache is static, for {rows} rows, and got {k.shape[0]}")
        if not self.static.fits(k, v):
            raise ValueError(
                f"layer {self.layer_idx} gives keys {list(k.shape)} and values {list(v.shape)} of {k.dtype} on "
                f"{k.device}, where {self.static} was expected; leave out rows for this model"
            )

    def get_seq_length(self) -> int:
        """Tokens seen. Positions and rotations are counted from it, so it is never the number stored."""
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of the mask that transformers makes for these layers; slot attention makes its own."""
        stored = self.store.used if self.store is not None else 0
        return stored + query_length, max(self.columns - stored, 0)

    def reset(self) -> None:
        if self.store is not None:
            self.store.clear()
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._touched()
        if self.store is not None:
            self._refuse_if_static("repeated")
            rows = torch.arange(self.store.seen.shape[0], device=self.store.seen.device)
            self.store.select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._touched()
        if self.store is not None:
            if indices.dtype == torch.bool:
                indices = indices.nonzero().flatten()
            if len(indices) != self.store.seen.shape[0]:
                self._refuse_if_static("taken out")
            self.store.select_rows(indices)

    def _refuse_if_static(self, what: str) -> None:
        if self.static is not None:
            raise ValueError(f"rows of a static cache cannot be {what}: they were allocated once; leave out rows")

    def offload(self) -> None:
        if self.store is not None:
            self._refuse_if_static("moved to another device")
            self._touched()
            self.store.move("cpu")

    def prefetch(self) -> None:
        if self.store is not None:
            self.store.move(self.device)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a bounded cache cannot be cropped: evicted tokens are gone; use snapshot() and restore()")

    # The work.

    def attend(self, module, q, k, v, scaling, softcap=None, s_aux=None) -> torch.Tensor:
        """Writes T new tokens, evicts down to the budget and attends. Returns [B, Q, T, D].

        A chunk attends before it evicts, a single token after (see Policy). Slots keep no graph: gradients flow through
        a first forward of one chunk, which attends to nothing but itself, and are refused elsewhere.

        Args:
            module: the attention module; a gate that reads keys and values is found there.
            q: [B, Q, T, D]; k, v: [B, H, T, D]; both rotated.

        Raises:
            ValueError: a second attention over the keys of one ``update``, or one over a part of them.
        """
        if self.waiting != q.shape[2]:
            raise ValueError(
                f"{type(module).__name__} attends more than once to the keys of one update, or to a part of them; "
                "slots can't serve such a model"
            )
        differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        alone = not self.columns - self.waiting and self.waiting <= (self.chunk or self.waiting)
        real = self.real
        with torch.no_grad():
            out = self._attend_in_chunks(module, q, k, v, scaling, softcap, s_aux)
        if differentiable:
            if alone:
                return gradients.attend_alone(q, k, v, real, scaling, softcap, s_aux)
            return gradients.refuse_backward(out, q, k, v)
        return out

    def _attend_in_chunks(self, module, q, k, v, scaling, softcap, s_aux) -> torch.Tensor:
        log_beta = self._take_log_beta(module, k, v) if "log_beta" in self.policy.needs else None
        self._note(q, k, scaling, softcap, s_aux)
        real, self.real, self.waiting = self.real, None, 0
        known, self.places = self.places, None
        if self.ahead is not None and k.shape[2] == 1:
            return self._decode_ahead(q, k, v, log_beta)
        if real is not None:
            real = real.to(k.device)
        T, step = k.shape[2], self.chunk or k.shape[2]
        if known is not None:
            known = tuple(t.to(k.device) for t in known) if 1 < T <= step else None
        out = []
        for start in range(0, T, step):
            part = slice(start, min(start + step, T))
            part_real = None if real is None else real[:, part]
            part_beta = None if log_beta is None else log_beta[:, :, part]
            new = self._new_tokens(module, q[:, :, part], k[:, :, part], v[:, :, part], part_real, part_beta, known)
            self.facts.more_follows = self.more or part.stop < T
            run = self._decode if new.k.shape[2] == 1 else self._prefill
            out.append(run(new, part_real))
        self.more = False
        return out[0] if len(out) == 1 else torch.cat(out, 2)

    def _note(self, q, k, scaling, softcap, s_aux) -> None:
        """What is known of a layer's attention from its first call on."""
        self.facts.scaling, self.facts.softcap, self.facts.s_aux = scaling, softcap, s_aux
        if self.store is not None:
            self.store.add_rows(self.policy.row_state(q.shape[1], *k.shape[1::2]))

    def _take_log_beta(self, module, k, v) -> torch.Tensor:
        gate = getattr(module, "retention_gate", None)
        if gate is not None and gate.reads_keys:
            self.log_beta = gate(k, v)
        log_beta, self.log_beta = self.log_beta, None
        if log_beta is None:
            raise ValueError(f"policy {self.policy.name} needs retention gates: call trimkv.attach(model, gates) first")
        return log_beta.to(k.device)

    def _new_tokens(self, module, q, k, v, real, log_beta, known) -> NewTokens:
        """The tokens of a chunk with their positions, and what the policy remembers of them."""
        B, H, T, _ = k.shape
        seen, count = self.store.seen[:, None], None
        if known is not None:
            position, count = known
        elif real is not None:
            position, count = places(self.store.seen, real)
        else:
            position = seen.clone() if T == 1 else seen + torch.arange(T, dtype=torch.int32, device=k.device)
        position = position[:, None].expand(B, H, T)
        new = NewTokens(k, v, position, {}, self.facts, self.store.rows, q, log_beta, module, count)
        if self.policy.selects:
            self.store.reserve(T)  # what it keeps per sequence may grow with the tokens
        new.state = self.policy.new_state(new)
        return new

    def _decode(self, new: NewTokens, real) -> torch.Tensor:
        """One token: it takes a free slot or the victim's, then attends to all slots of its head."""
        store, buffer = self.store, self.budget.buffer
        if self.static is not None:
            self._touched()
            self.open()
        free = store.growing or store.used < store.capacity
        slot = None if free else self.find_slot()
        moved = self.policy.moves_keys or self.policy.selects
        kernels = None if moved else fused.kernels(new.q, new.k, new.v)
        if kernels is not None:
            out = self._decode_fused(kernels, new, real, slot)
        else:
            if free:
                store.append(new)
            else:
                store.overwrite(slot, new, None if real is None else real[:, 0])
            store.advance(1, new.count)
            self._count_one()
            held, mask = store.view(), None
            if self.policy.selects:
                mask = self.policy.visible(held, new)
            elif self._any_empty and "attention" not in self.policy.needs:
                mask = held.valid[:, :, None, :]
            if mask is not None and real is not None:
                mask = mask | ~real[:, None, None, :]
            out = self._attend(held, new, real, mask)
        full = buffer and not store.growing and store.used == store.capacity
        if full and (self.padded or self.count == store.capacity):
            self._trim(store.view())
        return out

    def _count_one(self) -> None:
        self.count = min(self.count + 1, self.store.used)
        self.peak_decode_tokens = max(self.peak_decode_tokens, self._attended(self.count))

    def _attended(self, count: int) -> int:
        """The most of ``count`` tokens held that a decode step attends to."""
        return min(count, self.policy.attended(self.budget.tokens)) if self.policy.selects else count

    @property
    def looks_ahead(self) -> bool:
        """Whether a decode step can find the slot of the step after it."""
        return bool(self.policy.search) and not self.budget.buffer

    def find_slot(self) -> torch.Tensor:
        """int [B, H, 1]: where the next token goes when all slots are in view: an empty one, else the victim's."""
        if self.next_slot is not None:
            return self.next_slot[..., None]
        if self.static is not None:
            self.open()
        held = self.store.view()
        if self.budget.buffer:  # the last trim left free slots
            return held.position.argmin(-1, keepdim=True)
        return attention.victim(self._score(held, arriving=1), held.position)

    def _decode_fused(self, kernels, new: NewTokens, real, slot) -> torch.Tensor:
        """A decode step by the kernel. ``slot`` [B, H, 1] as for the plain one; None takes the next free slot."""
        store, facts, policy = self.store, self.facts, self.policy
        if slot is None:
            store.reserve(1)
            slot = torch.full(new.k.shape[:2], store.used, dtype=torch.int32, device=new.k.device)
            store.used += 1
        else:
            slot = slot[..., 0]
        if real is not None:
            slot = slot.masked_fill(~real, -1)
        ahead = self.looks_ahead and self.static is None and not store.growing and store.used == store.capacity
        watched = "attention" in policy.needs
        any_empty = self.padded or self.count + 1 < store.used
        got = self._run_kernel(
            kernels,
            *(new.q, new.k, new.v, new.state.get("log_beta"), slot, store.seen),
            score=policy.search if ahead else "none",
            used=store.used,
            any_empty=any_empty,
            probabilities=watched,
        )
        self.next_slot = got.next_slot if ahead else None
        if policy.search != "retention":
            store.overwrite_state(slot, new)
        store.advance(1, new.count)
        self._count_one()
        if policy.observes:
            held = store.view()
            shares = got.probabilities[:, :, : store.used] if watched else None
            seen = Seen(new.q, new.position[:, 0], real, held.k, held.position, facts, shares=shares)
            policy.observe(held, seen)
        return got.out[:, :, None]

    def _decode_ahead(self, q, k, v, log_beta) -> torch.Tensor:
        """A decode step of a static cache that knows where its tokens go: the kernel is all there is to do."""
        ahead, i = self.ahead, self.which
        ahead.join()
        self.open()
        self.peak_decode_tokens = max(self.peak_decode_tokens, self.count)
        got = self._run_kernel(
            ahead.kernels,
            *(q, k, v, log_beta, *ahead.places(i)),
            score=self.policy.search,
            next_slot_BH=ahead.next_slot[i],
            counters=ahead.counters,
        )
        return got.out[:, :, None]

    def decode_projected(self, kernels, qkv_BN, num_query_heads, rotation, head_norms, gate, scaling) -> torch.Tensor:
        """``update`` and ``attend`` of a single token per row from its layer's projections (``slots_hopper.decode``):
        norms, rotation and the gate's end are seen to there. Returns [B, Q D]."""
        ahead, i = self.ahead, self.which
        self.columns += 1
        self.real, self.facts.scaling = None, scaling
        self.open()
        self.peak_decode_tokens = max(self.peak_decode_tokens, self.count)
        store = self.store
        return kernels.decode(
            *(qkv_BN, num_query_heads, *rotation, *head_norms, gate),
            *(store.k, store.v, store.position, store.state["log_beta"] if gate else None),
            *(*ahead.places(i), scaling, self.policy.search),
            *(self.sinks, max(self.recent - 1, 0), self.policy.offset, ahead.next_slot[i], ahead.counters),
        )

    def _run_kernel(self, kernels, q, k, v, log_beta, slot, now, **options):
        """``slots_triton.decode`` with what this layer knows."""
        store, facts = self.store, self.facts
        retention = self.policy.search == "retention"
        return kernels.decode(
            *(q[:, :, 0], k[:, :, 0], v[:, :, 0], store.k, store.v, store.position, slot, now, facts.scaling),
            log_beta_new_BH=log_beta[:, :, 0].float() if retention else None,
            log_beta_BHC=store.state["log_beta"] if retention else None,
            softcap=facts.softcap,
            s_aux_Q=facts.s_aux,
            sinks=self.sinks,
            recent=max(self.recent - 1, 0),  # the arriving token is one of them
            offset=self.policy.offset,
            **options,
        )

    def open(self) -> None:
        """From here on all slots are in view, and any of them may be empty: rows are of any age, and a chunk is the
        same launches for ever, as a decode step is."""
        if self.store.used < self.store.capacity:
            self.store.open()
        self.padded, self.count = True, self.store.capacity

    def _trim(self, held: Slots) -> None:
        """Heads that hold M + W tokens go back to M by emptying W slots. Rows may differ; the host reads nothing."""
        full = (held.position >= 0).all(-1, keepdim=True)
        order = attention.rank_key(self._score(held), held.position)
        worst = order.topk(self.budget.buffer, dim=-1, largest=False).indices
        self.store.empty(torch.zeros_like(full).expand_as(held.position).scatter(2, worst, True) & full)
        if not self.padded:
            self.count = self.budget.tokens

    def _prefill(self, new: NewTokens, real) -> torch.Tensor:
        """A chunk: its tokens attend to the kept slots and to each other, then the best M of all are kept."""
        self._touched()
        store, n, T = self.store, self.store.used, new.k.shape[2]
        kernels = fused.kernels(new.q, new.k, new.v) if self.policy.needs <= {"log_beta"} else None
        self.peak_prefill_tokens = max(self.peak_prefill_tokens, self.count + T)
        keeper = None if kernels is None else self._keeper(T)
        if keeper is not None:
            store.advance(T, new.count)
            out = self._attend_fused(kernels, new)
            self._keep_in_place(keeper, new)
            return out
        together = store.view().with_new(new, keys=kernels is None) if n else new
        if n:
            # Without a copy of all keys and values, those that stay are gathered, keys first.
            gathered = 0 if kernels is None else 3 * min(n + T, store.capacity) * new.k[:, :, 0].nbytes
            self.transient_bytes = max(self.transient_bytes, together.nbytes + gathered)
        store.advance(T, new.count)
        if kernels is not None:
            out = self._attend_fused(kernels, new)
            self._keep(together, new)
            return out
        mask = None
        if "attention" not in self.policy.needs:
            if self._any_empty:
                mask = attention.position_rule(new.position[:, 0], together.position)
            elif n:
                mask = attention.causal_mask(T, n + T, new.k.device)
        out = self._attend(together, new, real, mask)
        self._keep(together, new)
        return out

    def _attend_fused(self, kernels, new: NewTokens) -> torch.Tensor:
        """A chunk's queries over the slots and the chunk, where both lie."""
        store, facts = self.store, self.facts
        how = facts.scaling, facts.softcap, facts.s_aux
        if not store.used and not self._any_empty and facts.softcap is None and facts.s_aux is None:
            return attention.attend_causal(new.q, new.k, new.v, *how)  # flash attention is the faster one
        new_position = new.position[:, 0]
        held = store.k, store.v, store.position
        out, _ = kernels.attend_chunk(
            new.q, new.k, new.v, new_position, *held, *how, used=store.used, any_empty=self._any_empty
        )
        return out

    def _attend(self, slots: Slots, new: NewTokens, real, mask) -> torch.Tensor:
        """The new tokens' queries over ``slots``, and the policy's look at it."""
        q, k, T, facts = new.q, slots.k, new.k.shape[2], self.facts
        how = facts.scaling, facts.softcap, facts.s_aux
        if self.policy.moves_keys and slots is not new:
            k = self.policy.keys(slots)
            self.transient_bytes = max(self.transient_bytes, k.nbytes)
        query_position, lse, weights = new.position[:, 0], None, None
        if "attention" in self.policy.needs:
            sees_all = T == 1 and not self._any_empty
            out, lse, weights = attention.attend_with_lse(
                q, k, slots.v, query_position, slots.position, *how, sees_all=sees_all
            )
        elif mask is None and T > 1:
            out = attention.attend_causal(q, k, slots.v, *how)
        else:
            out = attention.attend(q, k, slots.v, mask, *how)
        if self.policy.observes:
            self.policy.observe(slots, Seen(q, query_position, real, k, slots.position, facts, lse, weights))
        return out

    def _keep(self, together: Slots, new: Slots) -> None:
        """Brings what a chunk attended to back into the slots."""
        store, M, T = self.store, self.budget.tokens, new.k.shape[2]
        limit = max(self.budget.slots - 1, M)  # the most that may stay until the next forward
        total = together.position.shape[2]
        if total <= limit or not (self.policy.bounded or self.static):
            if self.policy.observes:  # the copy's state has learned what the store's has not
                for name, t in store.view().state.items():
                    t.copy_(together.state[name][:, :, :-T])
                    new.state[name] = together.state[name][:, :, -T:]
            store.append(new)
            self.count += T
            return
        if self.padded:
            num = min(limit, total)
        else:
            num = M if self.count + T > limit else self.count + T
        index = attention.best(self._score(together), together.position, num)
        position = together.position.gather(2, index)
        if self.padded and num > M:  # rows over the limit are cut to M, the others keep all they have
            over = (together.position >= 0).sum(-1, keepdim=True) > limit
            beyond_M = torch.arange(num, device=index.device) >= M
            position = position.masked_fill(over & beyond_M, NO_TOKEN)
        store.replace(new, together.state, index, position)
        if self.static is not None and self.padded:
            store.used = store.capacity  # still in view: the rest is empty
        self.count = min(self.count + T, num)

    def _keeper(self, T: int):
        """The module of kernels that do what ``_keep`` does where all slots are in view, or None if they cannot."""
        from ..attention import keep_triton

        in_view = self.static is not None and self.padded and self.store.used == self.store.capacity
        return keep_triton if in_view and self.looks_ahead and keep_triton.possible(self.store.capacity, T) else None

    def _keep_in_place(self, keeper, new: NewTokens) -> None:
        """``_keep`` by kernels, which touch no token that stays where it is."""
        store = self.store
        keeper.keep(
            *(new.k, new.v, new.position[:, 0], store.k, store.v, store.position, store.seen),
            *(new.state.get("log_beta"), store.state.get("log_beta")),
            score=self.policy.search,
            sinks=self.sinks,
            recent=self.recent,
            offset=self.policy.offset,
        )

    def _score(self, slots: Slots, arriving: int = 0) -> torch.Tensor:
        """The policy's score with sinks and recent tokens protected; an arriving token counts as one of the recent."""
        now = self.store.seen[:, None, None]
        recent = self.recent - arriving
        recent_from = now - recent if recent > 0 else None
        score = self.policy.score(slots, now)
        return attention.protect(score, slots.position, self.sinks, recent_from, self._any_empty)

    @property
    def _any_empty(self) -> bool:
        """Whether slots that were written may hold no token."""
        return self.padded or self.count < self.store.used

    # A row, copied out and put back.

    def snapshot(self, row: int) -> dict:
        """A copy of what one row holds, independent of this layer."""
        held = None if self.store is None else self.store.snapshot(row)
        return {"store": held, "columns": self.columns, "padded": self.padded, "count": self.count}

    def restore(self, row: int, snapshot: dict, rows: int) -> None:
        """Puts a row back, in place; an unused layer that is not static first makes room for ``rows`` rows."""
        self._touched()
        held = snapshot["store"]
        if held is None:
            self.reset()
            return
        if self.store is None or self.store.seen.shape[0] != rows:
            k, v = held["slots"]["k"][None, :, :0], held["slots"]["v"][None, :, :0]
            self.lazy_initialization(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1))
        if self.static is not None:
            self.open()
        self.store.add_rows(held["row_states"])
        alone = rows == 1 and self.static is None
        self.store.restore(row, held)
        if alone:
            self.store.used = held["slots"]["position"].shape[1]
        self.padded = snapshot["padded"] if alone else True
        self.columns = max(self.columns, snapshot["columns"]) if self.static is not None else snapshot["columns"]
        self.count = snapshot["count"] if alone else max(self.count, snapshot["count"])

    def copy_row(self, source: "BoundedLayer", source_row: int, row: int) -> None:
        """``restore`` from another layer of the same kind, without a copy in between."""
        if source.store is None:
            self.clear_row(row)
            return
        held = {"store": source.store.row(source_row)}
        numbers = {"columns": source.columns, "padded": source.padded, "count": source.count}
        self.restore(row, {**held, **numbers}, self.store.seen.shape[0])

    def clear_row(self, row: int) -> None:
        """Forgets one row of a static layer; the others do not notice."""
        self._touched()
        self.open()
        self.store.clear_row(row)
