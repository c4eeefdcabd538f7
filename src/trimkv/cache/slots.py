"""The slot store: where the keys and values of one layer live, for ever, in a fixed number of places."""

from dataclasses import dataclass, field

import torch

from ..attention.slots import NO_TOKEN
from ..hf.lasting import lasting
from ..ranks import Part
from .rotation import Rotation


@dataclass
class LayerFacts:
    """What holds for all tokens of a layer.

    Attributes:
        idx: the layer's number in the model.
        budget: M, tokens per KV head; 0 where nobody said.
        sinks: first tokens that are never evicted.
        rotation: how positions turn keys and queries; only for policies that need it.
        more_follows: whether the prompt goes on after the chunk that is being worked off.
        scaling, softcap, s_aux: how the layer's attention makes its logits, as in ``attention.slots.attend``; known
            from the first forward on.
        part: which of the layer's KV heads are in this process, where a model is sharded; None = all.
    """

    idx: int = 0
    budget: int = 0
    sinks: int = 0
    rotation: Rotation | None = None
    more_follows: bool = False
    scaling: float = 1.0
    softcap: float | None = None
    s_aux: torch.Tensor | None = None
    part: Part | None = None

    @property
    def first_head(self) -> int:
        """The number, in the layer, of the first KV head that is here."""
        return 0 if self.part is None else self.part.first

    def mean_over_heads(self, mean: torch.Tensor) -> torch.Tensor:
        """The mean over all heads of the layer, in place of one over those that are here."""
        return mean if self.part is None or self.part.whole else self.part.ranks.mean(mean)


@dataclass(frozen=True)
class RowState:
    """One tensor that a policy keeps per sequence and layer: [B, *shape], zeros for a new sequence.

    With ``every``, one for so many tokens seen: [B, N, *shape], which grows with a store that keeps every token.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    every: int = 0

    def shape_for(self, tokens: int) -> tuple[int, ...]:
        """The shape for a sequence of so many tokens."""
        return (tokens // self.every + 1, *self.shape) if self.every else self.shape


@dataclass
class Slots:
    """A view of tokens that a policy scores: kept slots, or kept slots followed by a chunk's new tokens.

    Shapes: ``k``, ``v`` [B, H, S, D]; ``position`` int32 [B, H, S], -1 where empty; ``state`` name -> [B, H, S];
    ``rows`` name -> [B, ...], what the policy keeps per sequence. Whoever changes state or rows does it in place.
    """

    k: torch.Tensor
    v: torch.Tensor
    position: torch.Tensor
    state: dict[str, torch.Tensor]
    layer: LayerFacts = field(default_factory=LayerFacts)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def valid(self) -> torch.Tensor:
        """bool [B, H, S]: which hold a token."""
        return self.position >= 0

    def with_new(self, new: "Slots", keys: bool = True) -> "Slots":
        """These slots followed by new tokens (a copy, for the time of one chunk), with or without keys and values."""
        state = {name: torch.cat([old, new.state[name]], 2) for name, old in self.state.items()}
        k = torch.cat([self.k, new.k], 2) if keys else None
        v = torch.cat([self.v, new.v], 2) if keys else None
        return Slots(k, v, torch.cat([self.position, new.position], 2), state, self.layer, self.rows)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.k, self.v, self.position, *self.state.values()) if t is not None)


@dataclass
class NewTokens(Slots):
    """Tokens that arrive, as ``Policy.new_state`` sees them.

    Attributes:
        q: their own queries [B, Q, T, D], rotated.
        log_beta: [B, H, T] from the layer's gate, for policies that need it.
        module: the layer's attention module, for policies with trained parts on it.
        count: int32 [B], how many are no padding; None: all of them.
    """

    q: torch.Tensor | None = None
    log_beta: torch.Tensor | None = None
    module: object = None
    count: torch.Tensor | None = None


class SlotStore:
    """The slots of one layer.

    Everything a token owns (key, value, position, whatever its policy keeps per token) sits at one index of the slot
    axis and is overwritten in place. Tensors are allocated once; nothing grows per token, and nothing is moved, sorted
    or re-rotated. Only ``capacity=None`` (policy ``full``) grows, by doubling.

    Attributes:
        k, v: [B, H, C, D].
        position: int32 [B, H, C], index of the token among its row's real tokens; -1 = empty.
        state: name -> [B, H, C], e.g. log_beta.
        rows: name -> [B, ...], what a policy keeps per sequence; added with ``add_rows``.
        seen: int32 [B], real tokens that each row has seen: the position of its next token.
        used: slots from this index on were never written. A host number, so that a short sequence in a large store
            costs what it needs.
    """

    @lasting
    def __init__(
        self,
        capacity: int | None,
        k_BHTD: torch.Tensor,
        v_BHTD: torch.Tensor,
        state: dict[str, torch.dtype],
        layer: LayerFacts | None = None,
    ):
        B, H, T, _ = k_BHTD.shape
        self.growing, self.layer, self.used = capacity is None, layer or LayerFacts(), 0
        self.capacity = max(T, 64) if capacity is None else capacity
        shape, device = (B, H, self.capacity), k_BHTD.device
        self.k = torch.zeros(*shape, k_BHTD.shape[-1], dtype=k_BHTD.dtype, device=device)
        self.v = torch.zeros(*shape, v_BHTD.shape[-1], dtype=v_BHTD.dtype, device=device)
        self.position = torch.full(shape, NO_TOKEN, dtype=torch.int32, device=device)
        self.state = {name: torch.zeros(shape, dtype=dtype, device=device) for name, dtype in state.items()}
        self.seen = torch.zeros(B, dtype=torch.int32, device=device)
        self.rows: dict[str, torch.Tensor] = {}
        self.row_states: dict[str, RowState] = {}

    @lasting
    def add_rows(self, rows: dict[str, RowState]) -> None:
        """Makes room for what a policy keeps per sequence, where that is not there yet."""
        for name, row in rows.items():
            assert name not in self._per_slot() and name != "seen", name
            if name not in self.rows:
                shape = self.seen.shape[0], *row.shape_for(self.capacity)
                self.rows[name] = torch.zeros(shape, dtype=row.dtype, device=self.seen.device)
                self.row_states[name] = row

    def reserve(self, tokens: int) -> None:
        """Makes room for so many more tokens in a store that grows."""
        end = self.used + tokens
        if self.growing and end > self.capacity:
            self._grow(max(end, 2 * self.capacity))

    @property
    def valid(self) -> torch.Tensor:
        """bool [B, H, C]: the slots that hold a token."""
        return self.position >= 0

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(t.nbytes for t in (*self._per_slot().values(), *self.rows.values(), self.seen))

    @property
    def held(self) -> torch.Tensor:
        """int64 [B, H]: tokens that each head holds."""
        return self.valid.sum(-1)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all heads of a row."""
        return self.k.shape[1] * (self.k.shape[-1] + self.v.shape[-1]) * self.k.element_size()

    def view(self) -> Slots:
        """The slots written so far, without a copy."""
        n = self.used
        state = {name: t[:, :, :n] for name, t in self.state.items()}
        return Slots(self.k[:, :, :n], self.v[:, :, :n], self.position[:, :, :n], state, self.layer, self.rows)

    def append(self, new: Slots) -> None:
        """Writes T tokens into the next free slots of every row and head."""
        end = self.used + new.k.shape[2]
        self.reserve(new.k.shape[2])
        self._fill(slice(self.used, end), new)
        self.used = end

    def overwrite(self, slot_BH1: torch.Tensor, new: Slots, real_B: torch.Tensor | None = None) -> None:
        """Writes one token per head over slot ``slot_BH1``; rows with ``real_B`` False stay as they are."""
        index = slot_BH1[..., None].expand(-1, -1, 1, self.k.shape[-1])
        index_v = slot_BH1[..., None].expand(-1, -1, 1, self.v.shape[-1])
        k, v, position, state = new.k, new.v, new.position, new.state
        if real_B is not None:
            row = real_B[:, None, None]
            k = torch.where(row[..., None], k, self.k.gather(2, index))
            v = torch.where(row[..., None], v, self.v.gather(2, index_v))
            position = torch.where(row, position, self.position.gather(2, slot_BH1))
            state = {name: torch.where(row, t, self.state[name].gather(2, slot_BH1)) for name, t in state.items()}
        self.k.scatter_(2, index, k)
        self.v.scatter_(2, index_v, v)
        self.position.scatter_(2, slot_BH1, position)
        for name, t in state.items():
            self.state[name].scatter_(2, slot_BH1, t)

    def overwrite_state(self, slot_BH: torch.Tensor, new: Slots) -> None:
        """What ``overwrite`` does for the state that policies keep per token; slot -1 writes nothing."""
        index, writes = slot_BH.clamp_min(0).long()[..., None], (slot_BH >= 0)[..., None]
        for name, t in new.state.items():
            held = self.state[name]
            held.scatter_(2, index, torch.where(writes, t, held.gather(2, index)))

    def replace(
        self, new: Slots, state: dict[str, torch.Tensor], index_BHN: torch.Tensor, position_BHN: torch.Tensor
    ) -> None:
        """Fills the first N slots with a choice of the tokens held and the new ones; the rest become empty.

        Keys, then values are gathered from where they are: three copies of N of them exist for that time.

        Args:
            state: of the tokens held, followed by that of the new ones.
            index_BHN: the chosen, numbered likewise.
        """
        n, N = self.used, index_BHN.shape[2]
        state = {name: t.gather(2, index_BHN) for name, t in state.items()}
        old, late = index_BHN.clamp_max(n - 1)[..., None], (index_BHN - n).clamp_min(0)[..., None]
        is_new = (index_BHN >= n)[..., None]

        def pick(held: torch.Tensor, arrived: torch.Tensor) -> torch.Tensor:
            arrived = arrived.gather(2, late.expand(*late.shape[:-1], arrived.shape[-1]))
            if not n:
                return arrived
            return torch.where(is_new, arrived, held.gather(2, old.expand(*old.shape[:-1], held.shape[-1])))

        if self.growing and N > self.capacity:
            self._grow(N)
        self.k[:, :, :N] = pick(self.k, new.k)
        self.v[:, :, :N] = pick(self.v, new.v)
        self.position.fill_(NO_TOKEN)
        self.position[:, :, :N] = position_BHN
        for name, t in state.items():
            self.state[name][:, :, :N] = t
        self.used = N

    def advance(self, tokens: int, real_B: torch.Tensor | None = None) -> None:
        """Counts new tokens as seen; where ``real_B``, how many are no padding, is given, it is those."""
        self.seen += tokens if real_B is None else real_B

    def empty(self, evicted_BHS: torch.Tensor) -> None:
        """Empties slots in place: keys and values stay where they are, nobody attends to them any more."""
        self.position[:, :, : evicted_BHS.shape[2]].masked_fill_(evicted_BHS, NO_TOKEN)

    def clear(self) -> None:
        """Forgets every token, keeps the memory."""
        self.position.fill_(NO_TOKEN)
        self.seen.zero_()
        for t in self.rows.values():
            t.zero_()
        self.used = 0

    def open(self) -> None:
        """Brings every slot into view: those never written are empty ones, and hold zeros, not what was there before
        (a masked NaN is still NaN in a product)."""
        for name, t in self._per_slot().items():
            t[:, :, self.used :].fill_(NO_TOKEN if name == "position" else 0)
        self.used = self.capacity

    def clear_row(self, row: int) -> None:
        """Forgets one row's tokens, and what they were."""
        for name, t in self._per_slot().items():
            t[row].fill_(NO_TOKEN if name == "position" else 0)
        for t in (self.seen, *self.rows.values()):
            t[row].zero_()

    @lasting
    def select_rows(self, index: torch.Tensor) -> None:
        """Rows become ``rows[index]``, in all tensors: beam reorder, batch selection and repetition."""
        index = index.to(self.seen.device)
        if index.shape[0] == self.seen.shape[0]:  # in place: whoever holds the tensors goes on holding them
            for t in (*self._per_slot().values(), *self.rows.values(), self.seen):
                t.copy_(t.index_select(0, index))
            return
        for name, t in self._per_slot().items():
            self._set(name, t.index_select(0, index))
        for name, t in self.rows.items():
            self.rows[name] = t.index_select(0, index)
        self.seen = self.seen.index_select(0, index)

    @lasting
    def snapshot(self, row: int) -> dict:
        """A copy of one row: name -> [H, used, ...], its ``seen`` and what its policy keeps per sequence."""
        row = self.row(row)
        slots = {name: t.clone() for name, t in row["slots"].items()}
        rows = {name: t.clone() for name, t in row["rows"].items()}
        return {**row, "slots": slots, "rows": rows, "seen": row["seen"].clone()}

    def row(self, row: int) -> dict:
        """``snapshot`` without a copy: views, for the time until the store changes."""
        slots = {name: t[row, :, : self.used] for name, t in self._per_slot().items()}
        rows = {name: t[row] for name, t in self.rows.items()}
        return {"slots": slots, "seen": self.seen[row], "rows": rows, "row_states": dict(self.row_states)}

    def restore(self, row: int, snapshot: dict) -> None:
        """Puts a copied row (or another store's ``row``) into this store, in place.

        Raises:
            ValueError: more slots than there are here.
        """
        n = snapshot["slots"]["position"].shape[1]
        if n > self.capacity:
            if not self.growing:
                raise ValueError(f"a row of {n} slots does not fit a store of {self.capacity}")
            self._grow(n)
        for name, t in self._per_slot().items():
            t[row, :, :n].copy_(snapshot["slots"][name])
            t[row, :, n:].fill_(NO_TOKEN if name == "position" else 0)
        self.seen[row].copy_(snapshot["seen"])
        for name, t in snapshot["rows"].items():
            mine = self.rows[name][row]
            if self.row_states[name].every:
                shared = min(len(mine), len(t))  # what the longer one has beyond is unused
                mine, t = mine[:shared], t[:shared]
            mine.copy_(t)
        self.used = max(self.used, n)

    def put_row(self, row_1: torch.Tensor, other: "SlotStore") -> None:
        """Copies the one row of another store, of as many slots, over the row whose number, int64, is on the device."""
        theirs = other._per_slot()
        for name, t in self._per_slot().items():
            t.index_copy_(0, row_1, theirs[name])
        for name, t in self.rows.items():
            t.index_copy_(0, row_1, other.rows[name])
        self.seen.index_copy_(0, row_1, other.seen)

    @lasting
    def move(self, device: torch.device | str) -> None:
        """Moves every tensor to a device."""
        for name, t in self._per_slot().items():
            self._set(name, t.to(device, non_blocking=True))
        for name, t in self.rows.items():
            self.rows[name] = t.to(device, non_blocking=True)
        self.seen = self.seen.to(device, non_blocking=True)

    def _per_slot(self) -> dict[str, torch.Tensor]:
        return {"k": self.k, "v": self.v, "position": self.position, **self.state}

    def _set(self, name: str, t: torch.Tensor) -> None:
        if name in self.state:
            self.state[name] = t
        else:
            setattr(self, name, t)

    def _fill(self, where: slice, new: Slots) -> None:
        self.k[:, :, where] = new.k
        self.v[:, :, where] = new.v
        self.position[:, :, where] = new.position
        for name, t in new.state.items():
            self.state[name][:, :, where] = t

    @lasting
    def _grow(self, capacity: int) -> None:
        for name, t in self._per_slot().items():
            larger = t.new_full((*t.shape[:2], capacity, *t.shape[3:]), NO_TOKEN if name == "position" else 0)
            larger[:, :, : t.shape[2]] = t
            self._set(name, larger)
        for name, state in self.row_states.items():
            if state.every:
                t = self.rows[name]
                larger = t.new_zeros(t.shape[0], *state.shape_for(capacity))
                larger[:, : t.shape[1]] = t
                self.rows[name] = larger
        self.capacity = capacity
