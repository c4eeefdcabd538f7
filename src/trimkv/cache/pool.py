"""The pool: where the tokens of heads that share a budget live."""

from collections.abc import Callable

import torch

from ..attention.slots import NO_TOKEN
from ..budget import Budget
from ..hf.lasting import lasting
from . import shares
from .slots import LayerFacts, Slots

Order = Callable[[Slots, torch.Tensor], torch.Tensor]  # tokens and their heads' numbers -> shares.order of them


class Pool:
    """The slots of all heads that share a budget: those of one layer, or of all layers.

    A slot belongs to whichever head needs it. Keys and values are stored once, at their slot, and never move; each head
    has a list of its slots, as long as the most tokens that it may hold. The slot after the last one, and the place
    after the last list's, take what shall go nowhere, so that nothing branches on a tensor.

    Attributes:
        N: heads that share: KV heads x layers. P: slots, M x N.
        k, v: [B, P + 1, D].
        position: int32 [B, P + 1], -1 = empty.
        state: name -> [B, P + 1], what the policy keeps per token.
        table: int32 [B, N * ceiling + 1], each head's list of slots; P = none.
        place: int32 [B, P + 1], the place in ``table`` that names the slot.
        seen: int32 [B], real tokens that each row has seen.
        used: tokens per head that were written without an eviction, at most M; a host number.
        width: places of each list from this one on were never written; a host number.
        tight: whether all places before ``width`` hold a token in every row.
    """

    @lasting
    def __init__(self, budget: Budget, layers: int, k_BHTD, v_BHTD, state: dict[str, torch.dtype], layer: LayerFacts):
        B, self.H = k_BHTD.shape[:2]
        self.layers, self.layer, self.device = layers, layer, k_BHTD.device
        self.M, self.N = budget.tokens, layers * self.H
        self.P, self.ceiling, self.floor = self.M * self.N, budget.most(self.N), budget.least
        self.k, self.v = (t.new_zeros(B, self.P + 1, t.shape[-1]) for t in (k_BHTD, v_BHTD))
        self.position = self._int(B, self.P + 1, NO_TOKEN)
        self.state = {name: torch.zeros_like(self.position, dtype=dtype) for name, dtype in state.items()}
        self.table = self._int(B, self.N * self.ceiling + 1, self.P)
        self.place = self._int(B, self.P + 1, self.N * self.ceiling)
        self.seen = torch.zeros(B, dtype=torch.int32, device=self.device)
        self.rows: dict[str, torch.Tensor] = {}
        self.used = self.width = 0
        self.tight = True
        self.free: torch.Tensor | None = None  # [B, layers, H], the slots of the tokens that arrive

    def add_rows(self, rows: dict) -> None:
        assert not rows, "a policy that shares a budget keeps nothing per sequence"

    @property
    def lists(self) -> torch.Tensor:
        """int32 [B, N, ceiling]: ``table`` by head."""
        return self.table[:, :-1].view(-1, self.N, self.ceiling)

    @property
    def held(self) -> torch.Tensor:
        """int64 [B, N]: tokens that each head holds."""
        return (self.lists[..., : self.width] < self.P).sum(-1)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(t.nbytes for t in self._tensors().values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all heads of a row."""
        return self.N * (self.k.shape[-1] + self.v.shape[-1]) * self.k.element_size()

    def choice_bytes(self, tokens: int) -> int:
        """What ranking takes for a moment, with so many new tokens per head: eight numbers of 8 bytes for each place in
        the lists, about."""
        return 64 * len(self.seen) * self.N * (self.width + tokens)

    def fits(self, tokens: int) -> bool:
        """Whether so many more tokens per head fit without an eviction, by what the host knows."""
        return self.used + tokens <= self.M

    def view(self, layer: int) -> Slots:
        """A copy of a layer's tokens by head, [B, H, width, D], for the time of its attention."""
        B, shape = len(self.seen), (len(self.seen), self.H, self.width)
        slot = self._lists_of(layer)[..., : self.width].flatten(1).long()
        flat = self._flat(slot)
        k, v = (t.flatten(0, 1).index_select(0, flat).view(*shape, t.shape[-1]) for t in (self.k, self.v))
        return Slots(k, v, self.position.gather(1, slot).view(B, self.H, -1), {}, self.layer)

    # Tokens that come.

    def append(self, layer: int, new: Slots) -> None:
        """Writes T tokens per head into slots and places that were never used; padding leaves its own empty."""
        T = new.k.shape[2]
        place = self._first_places(layer) + torch.arange(self.used, self.used + T, device=self.device)  # [H, T]
        head = layer * self.H + torch.arange(self.H, device=self.device)
        slot = head[:, None] + self.N * torch.arange(self.used, self.used + T, device=self.device)
        real = new.position >= 0
        self._put(slot.where(real, self.P).flatten(1), new, new.position.flatten(1))
        self._list(slot.where(real, self.P).flatten(1), place.where(real, self.N * self.ceiling).flatten(1))

    def make_room(self, order: Order, real_B: torch.Tensor | None) -> None:
        """Frees a slot for the token that arrives in each of the N heads; rows without one stay as they are."""
        self.tight, P = False, self.P
        key = order(self._everything, self.place[:, None] // self.ceiling)[:, 0]
        slot = shares.victims(key, self.lists[..., : self.width], self.floor, full=self.width == self.ceiling)
        place = self.place.gather(1, slot)
        if real_B is not None:
            slot = slot.where(real_B[:, None], P)
            place = place.where(real_B[:, None], self.N * self.ceiling)
        self.table.scatter_(1, place.long(), P)
        self.position.scatter_(1, slot, NO_TOKEN)
        self.free = slot.view(-1, self.layers, self.H)
        self.width = min(self.width + 1, self.ceiling)

    def expire(self, score: Callable[[Slots], torch.Tensor], least: float) -> None:
        """Empties the slots of tokens that score less than ``least``."""
        self.tight, nowhere = False, self.N * self.ceiling
        gone = (score(self._everything)[:, 0] < least) & (self.position >= 0)
        self.table.scatter_(1, self.place.where(gone, nowhere).long(), self.P)
        self.position.masked_fill_(gone, NO_TOKEN)
        self.place.masked_fill_(gone, nowhere)

    def write(self, layer: int, new: Slots) -> None:
        """Writes one token per head into the slots that ``make_room`` freed for the layer."""
        slot = self.free[:, layer]
        column = self._lists_of(layer)[..., : self.width].argmax(-1)  # P, the largest number, stands for no slot
        place = self._first_places(layer)[:, 0] + column
        self._put(slot, new, new.position.flatten(1))
        self._list(slot, place.where(slot < self.P, self.N * self.ceiling))

    def select(self, order: Order, new: list[Slots]) -> None:
        """Cuts what is held and the T new tokens of each head, one entry per layer, to the budget."""
        self.tight, P, W, T = False, self.P, self.width, new[0].k.shape[2]
        B, N = len(self.seen), self.N
        lists = self.lists[..., :W].long()
        names = self.state

        def together(old_BP: torch.Tensor, new_BNT: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([old_BP.gather(1, lists.flatten(1)).view(B, N, W), torch.cat(new_BNT, 1)], 2)

        position = together(self.position, [part.position for part in new])
        state = {name: together(self.state[name], [part.state[name] for part in new]) for name in names}
        head = torch.arange(N, device=self.device)[:, None]
        key = order(Slots(None, None, position, state, self.layer), head)
        keep_old, keep_new = shares.keepers(key, P, self.floor, self.ceiling).split([W, T], 2)
        old = lists.where(keep_old, P)
        taken = torch.zeros_like(self.position, dtype=torch.bool).scatter_(1, old.flatten(1), True)[:, :P]
        free = taken.to(torch.uint8).sort(stable=True).indices
        rank = keep_new.flatten(1).cumsum(-1) - 1
        slot = free.gather(1, rank.clamp(0, P - 1)).view(B, N, T).where(keep_new, P)
        self.position[:, :P].masked_fill_(~taken, NO_TOKEN)
        for part, at in zip(new, slot.split(self.H, 1), strict=True):
            self._put(at.flatten(1), part, part.position.where(at < P, NO_TOKEN).flatten(1))
        self.width = min(W + T, self.ceiling)
        self.lists[..., : self.width] = torch.cat([old, slot], 2).sort(-1).values[..., : self.width].int()
        places = torch.arange(N * self.ceiling, dtype=torch.int32, device=self.device).expand(B, -1)
        self.place.scatter_(1, self.table[:, :-1].long(), places)
        self.place[:, P] = N * self.ceiling

    def advance(self, tokens: int, real_BT: torch.Tensor | None) -> None:
        """Counts new tokens as seen, after the last layer; where ``real_BT`` is given, padding does not count."""
        self.seen += tokens if real_BT is None else real_BT.sum(-1, dtype=torch.int32)
        self.used, self.free = min(self.used + tokens, self.M), None

    # Rows.

    def clear(self) -> None:
        """Forgets every token, keeps the memory."""
        self.position.fill_(NO_TOKEN)
        self.table.fill_(self.P)
        self.place.fill_(self.N * self.ceiling)
        self.seen.zero_()
        self.used, self.width, self.tight = 0, 0, True

    @lasting
    def select_rows(self, index: torch.Tensor) -> None:
        """Rows become ``rows[index]``, in all tensors."""
        for name, t in self._tensors().items():
            self._set(name, t.index_select(0, index.to(t.device)))

    @lasting
    def move(self, device: torch.device | str) -> None:
        """Moves every tensor to a device."""
        for name, t in self._tensors().items():
            self._set(name, t.to(device, non_blocking=True))
        self.device = torch.device(device)

    @lasting
    def snapshot(self, row: int) -> dict:
        """A copy of one row, and the numbers that the host keeps."""
        copy = {name: t[row].clone() for name, t in self._tensors().items()}
        return {"tensors": copy, "heads": self.H, "numbers": (self.used, self.width, self.tight)}

    def restore(self, row: int, snapshot: dict) -> None:
        """Puts a copied row back, into this pool or into another of the same budget."""
        for name, t in self._tensors().items():
            if t[row].shape != snapshot["tensors"][name].shape:
                raise ValueError("a snapshot fits a cache of the same budget, scope and ceiling only")
            t[row] = snapshot["tensors"][name]
        used, width, tight = snapshot["numbers"]
        if len(self.seen) == 1:
            self.used, self.width, self.tight = used, width, tight
        else:
            self.used, self.width, self.tight = max(self.used, used), max(self.width, width), False

    def _tensors(self) -> dict[str, torch.Tensor]:
        names = ("k", "v", "position", "table", "place", "seen")
        return {**{name: getattr(self, name) for name in names}, **self.state}

    def _set(self, name: str, t: torch.Tensor) -> None:
        if name in self.state:
            self.state[name] = t
        else:
            setattr(self, name, t)

    def _int(self, rows: int, columns: int, value: int) -> torch.Tensor:
        return torch.full((rows, columns), value, dtype=torch.int32, device=self.device)

    @property
    def _everything(self) -> Slots:
        """All slots as those of one head, [B, 1, P + 1], without keys and values."""
        state = {name: t[:, None] for name, t in self.state.items()}
        return Slots(None, None, self.position[:, None], state, self.layer)

    def _lists_of(self, layer: int) -> torch.Tensor:
        return self.lists[:, layer * self.H : (layer + 1) * self.H]

    def _first_places(self, layer: int) -> torch.Tensor:
        """int64 [H, 1]: where in ``table`` the lists of a layer begin."""
        return (layer * self.H + torch.arange(self.H, device=self.device))[:, None] * self.ceiling

    def _flat(self, slot_BX: torch.Tensor) -> torch.Tensor:
        """Slots counted through all rows."""
        B = len(self.seen)
        if B > 1:
            slot_BX = slot_BX + torch.arange(B, device=self.device)[:, None] * (self.P + 1)
        return slot_BX.flatten()

    def _put(self, slot_BX: torch.Tensor, new: Slots, position_BX: torch.Tensor) -> None:
        """Writes X = H * T tokens of a layer into their slots."""
        flat = self._flat(slot_BX)
        for mine, theirs in ((self.k, new.k), (self.v, new.v)):
            mine.flatten(0, 1)[flat] = theirs.reshape(-1, theirs.shape[-1])
        self.position.scatter_(1, slot_BX, position_BX)
        for name, t in new.state.items():
            self.state[name].scatter_(1, slot_BX, t.flatten(1))

    def _list(self, slot_BX: torch.Tensor, place_BX: torch.Tensor) -> None:
        self.table.scatter_(1, place_BX, slot_BX.int())
        self.place.scatter_(1, slot_BX, place_BX.int())
