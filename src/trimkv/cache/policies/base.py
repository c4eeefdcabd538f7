"""What a policy is."""

from dataclasses import dataclass, field

import torch

from ..seen import Seen
from ..slots import NewTokens, RowState, Slots

NEEDS = ("log_beta", "keys", "values", "rotation", "queries", "attention")


@dataclass(frozen=True)
class Published:
    """How a method was published, where that differs from what its policy does here.

    Attributes:
        options: of the policy.
        name: the policy that has the published form, if it is another one.
        buffer: tokens above the budget that decoding may hold between evictions; 1 attends before it evicts.
        whole_prompt: a prompt attends in full and evicts once, after it.
        split: of the budget among layers, see ``Budget``; None leaves it as it is.
    """

    options: dict = field(default_factory=dict)
    name: str = ""
    buffer: int = 0
    whole_prompt: bool = True
    split: str | None = None


class Policy:
    """Says what each token in the slots is worth. The lowest score is overwritten first.

    A policy is this class with a ``score``; storage, protection of sinks and recent tokens, tie-breaking, accounting
    and kernels are the same for all. A policy object holds no per-sequence state: what it must remember about a token
    it names in ``state`` and gives in ``new_state``, what it must remember about a sequence in ``row_state``; the slot
    store carries both along.

    The order of time, for every policy. A decode step at position p, all M slots taken: ``score`` with now = p ranks
    the M held tokens; the arriving token takes the victim's slot; it attends to M tokens, itself included; then
    ``observe``. A chunk of a prompt: its queries attend to the kept slots and the chunk; ``observe``; then ``score``
    with now = the next position ranks all of them, and the best M stay. With a buffer W a decode step attends to up to
    M + W, and ``score`` cuts to M when M + W are taken, after ``observe``.

    Class attributes:
        name: as on the command line.
        needs: what a score is made of, any of ``NEEDS``: "log_beta" (trained gates), "keys", "values", "rotation"
            (``slots.layer.rotation``); "queries" and "attention" are given to ``observe``. A policy that needs neither
            of these two can be replayed (replay.py), unless it ``selects`` and not ``selects_at_once``.
        trained: whether it needs trained weights.
        source: paper section and repository commit.
        bounded: False keeps every token.
        grows: True evicts after chunks of a prompt only, and keeps every decoded token.
        sinks: first tokens that the method itself never evicts.
        recent_share: share of the budget that is reserved for the newest tokens unless the Budget says how many.
        state: name -> dtype of what it stores per token beside key, value and position.
        moves_keys: whether queries see keys elsewhere than at their true positions (``keys``).
        head: name of the trained part that it needs on every attention module, beside or in place of gates.
        selects: True keeps every token, and each decode step attends to a choice of them (``visible``).
        selects_at_once: whether ``visible`` answers for T tokens that came one by one as it did for each when it came,
            although the slots, and what it keeps per sequence, know the later ones.
        search, offset: by which score the decode kernel can find the next victim while it attends ("retention",
            "position": see ``attention.slots_triton.decode``); "" where it cannot.
        published: what ``as_published`` changes; None where the published form is the one here, or cannot be had.
        comparable: whether scores of different heads and layers may be compared, so that heads can share a budget. The
            score is then made of position and state alone, and the policy does not observe: ``score`` gets ``slots``
            without keys and values, of whatever heads.

    Where a model is sharded by heads, a policy sees the heads of its process: H is their number, and
    ``slots.layer`` says which they are (``first_head``) and makes means over all (``mean_over_heads``).

    And in words, for ``trimkv policies``: formula, evicts, peak_decode, peak_prefill (the most tokens attended to), and
    deviations (from the source, with the reason).
    """

    name: str
    needs: frozenset[str] = frozenset()
    trained = False
    source = ""
    bounded = True
    grows = False
    sinks = 0
    recent_share = 0.0
    state: dict[str, torch.dtype] = {}
    moves_keys = False
    head = ""
    selects = selects_at_once = False
    comparable = False
    published: Published | None = None
    search = ""
    offset = 0

    formula = ""
    evicts = "before each decoded token attends; after each chunk of a prompt"
    peak_decode = "M"
    peak_prefill = "M + chunk"
    deviations = ""

    @property
    def observes(self) -> bool:
        """Whether ``observe`` is called."""
        return not self.needs.isdisjoint({"queries", "attention"})

    def fitted(self, modules: dict[int, torch.nn.Module]) -> "Policy":
        """The policy for a model with these attention modules: itself, or a copy that knows the size of its heads.

        Raises:
            ValueError: modules lack the policy's trained heads.
        """
        if self.head and any(getattr(module, self.head, None) is None for module in modules.values()):
            raise ValueError(
                f"policy {self.name} needs trained heads and the model has none: call "
                f"trimkv.gates.head_sets.attach_heads(model, folder) first, or choose a policy without training"
            )
        return self

    def new_state(self, new: NewTokens) -> dict[str, torch.Tensor]:
        """What to remember about T new tokens, at their creation: name -> [B, H, T], tensors of their own."""
        return {}

    def row_state(self, Q: int, H: int, D: int) -> dict[str, RowState]:
        """What to remember about a sequence in each layer, for Q query heads and H KV heads of dimension D."""
        return {}

    def score(self, slots: Slots, now_B11: torch.Tensor) -> torch.Tensor:
        """fp32 [B, H, S], higher = keep.

        Args:
            slots: the candidates, in any order; empty ones may score anything.
            now_B11: int32 [B, 1, 1], the position of the query that is served next.
        """
        raise NotImplementedError

    def observe(self, slots: Slots, seen: Seen) -> None:
        """Updates ``slots.state`` and ``slots.rows`` in place after attention. Padding queries must leave no trace:
        ``seen`` gives them zero probability, and ``seen.where_real`` keeps what rows without a real query had."""

    def keys(self, slots: Slots) -> torch.Tensor:
        """Keys as queries shall see them, [B, H, S, D]; only called where ``moves_keys``. Never changes ``slots.k``."""
        return slots.k

    def visible(self, slots: Slots, new: NewTokens) -> torch.Tensor:
        """bool [B, H, T, S]: the slots that each decoded token attends to, itself included; only where ``selects``.

        Args:
            slots: all tokens held, the new ones included. What is said of a slot whose token is later than the query is
                not looked at.
            new: one token; T successive ones where ``selects_at_once``.
        """
        raise NotImplementedError

    def attended(self, M: int) -> int:
        """The most slots that ``visible`` shows at a budget of M tokens; only where ``selects``."""
        return M

    def extra_bytes(self, tokens: int, Q: int, H: int, D: int) -> int:
        """Bytes per sequence and layer beside keys, values and positions, for a budget (with buffer) of ``tokens``."""
        per_token = sum(dtype.itemsize for dtype in self.state.values())
        rows = self.row_state(Q, H, D).values()
        return tokens * H * per_token + sum(_numel(row.shape_for(tokens)) * row.dtype.itemsize for row in rows)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
