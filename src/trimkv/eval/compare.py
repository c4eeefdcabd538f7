"""Teacher-forced comparison of bounded caches with the full one."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from transformers.cache_utils import DynamicCache

from ..budget import Budget
from ..cache.build import bounded_cache
from ..cache.graph import DecodeStep
from ..cache.policies import Policy, make
from ..cache.replay import replayable
from ..hf.calls import with_cache
from . import layerwise


@dataclass(frozen=True)
class Row:
    """One policy at one budget.

    Attributes:
        kl: KL(full || policy) in nats, averaged over predicted tokens.
        perplexity: of the true next tokens.
        top1_agreement: share of positions where the most probable token is the full model's.
        tokens: predicted tokens.
        peak_tokens_per_head: the most tokens that any query attended to, itself included.
        mean_tokens_per_head: the same, as a mean over the heads that share a budget.
    """

    policy: str
    budget: int
    kl: float
    perplexity: float
    top1_agreement: float
    tokens: int
    peak_tokens_per_head: int
    mean_tokens_per_head: float


@dataclass(frozen=True)
class Comparison:
    """All rows, and the full model on the same text."""

    rows: list[Row]
    full_perplexity: float
    context: int
    sequences: int
    model: str

    def as_dict(self) -> dict:
        return asdict(self)


@torch.inference_mode()
def compare(
    model,
    ids_NT: torch.Tensor,
    policies: Sequence[str | Policy],
    budgets: Sequence[int | Budget],
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
    name: str | None = None,
    stepwise: bool = False,
    block: int = 128,
) -> Comparison:
    """Every policy at every budget: position t attends to itself and to what the policy kept, or selects, of the tokens
    before it, never to more than the budget, and eviction happens at every token.

    What is kept depends on keys and gates alone for most policies, and what is selected on these and the position's own
    query. Their sequences are read in one forward pass that replays all steps in each layer (layerwise.py): the numbers
    of feeding one token at a time, in a small part of the time. Policies whose scores need attention, budgets with a
    buffer, and models whose rotations depend on the length are fed token by token.

    Args:
        ids_NT: int64 [N, T], sequences of equal length without padding. Position t predicts token t + 1.
        policies: names or Policy objects. "full" ignores the budget: a check of the measurement itself (kl ~ 0).
        budgets: tokens per head, or Budgets.
        batch_size: sequences that advance together.
        progress: called as ``progress(done, total)``.
        name: what the result calls the model.
        stepwise: feed everything token by token.
        block: positions of the full model that are held at a time, token by token.

    Returns:
        A Comparison with one row per policy and budget, policies outermost.

    Raises:
        ValueError: as ``bounded_cache``; or nothing to predict.
    """
    N, T = ids_NT.shape
    if N < 1 or T < 2:
        raise ValueError(f"nothing to predict in {N} sequences of {T} tokens")
    grid = _grid(policies, budgets, model.device)
    cells = list(dict.fromkeys(cell for cell, _ in grid))
    at_once = not stepwise and layerwise.same_rotations(model, T)
    fast = [cell for cell in cells if at_once and replayable(cell.policy, cell.budget)]
    slow = [cell for cell in cells if cell not in fast]
    slot_layers = len(bounded_cache(model, fast[0].policy, fast[0].budget).slot_layers) if fast else 0
    batches = math.ceil(N / batch_size)
    total = batches * (len(fast) * slot_layers + len(slow) * (T - 1))
    done = itertools.count(1)

    def tick() -> None:
        progress(next(done), total)

    full = _Sums(model.device)
    if fast:
        layerwise.measure(model, ids_NT, fast, full, batch_size, tick)
    if slow:
        full = _Sums(model.device)
        _measure_stepwise(model, ids_NT, slow, full, batch_size, block, tick)
    rows = [cell.row(budget) for cell, budget in grid]
    name = name or model.config._name_or_path or type(model).__name__
    return Comparison(rows, full.perplexity, context=T, sequences=N, model=name)


def compare_stepwise(model, ids_NT: torch.Tensor, policies, budgets, **options) -> Comparison:
    """``compare`` by feeding one token a forward pass to real bounded caches: the truth that it must agree with.

    ``progress`` counts forward passes of bounded caches.
    """
    return compare(model, ids_NT, policies, budgets, stepwise=True, **options)


def _measure_stepwise(model, ids_NT, cells: list["_Cell"], full: "_Sums", batch_size: int, block: int, tick) -> None:
    """The full model reads ``block`` positions at a time, and every bounded cache then takes the same positions one by
    one: the predictions of one block are all that is ever held of the teacher. On a GPU, where one sequence's step is
    hundreds of launches of next to nothing, cells run side by side, each on a stream of its own."""
    T, lanes = ids_NT.shape[1], _Lanes(model.device, len(cells))
    for ids_BT in ids_NT.to(model.device).split(batch_size):
        lanes.fork()
        for cell, lane in lanes.over(cells):
            with lane:
                cell.begin(model, len(ids_BT))
        teacher = DynamicCache(config=model.config.get_text_config(decoder=True))
        for start in range(0, T - 1, block):
            end = min(start + block, T - 1)
            next_BS = ids_BT[:, start + 1 : end + 1]
            logits_BSV = model(input_ids=ids_BT[:, start:end], use_cache=True, **with_cache(model, teacher)).logits
            best_BS = logits_BSV.argmax(-1)
            logp_BSV = full.add(logits_BSV.flatten(0, 1), next_BS.flatten()).unflatten(0, best_BS.shape)
            del logits_BSV
            lanes.fork()
            for s in range(end - start):
                for cell, lane in lanes.over(cells):
                    with lane:
                        cell.step(ids_BT[:, start + s], next_BS[:, s], logp_BSV[:, s], best_BS[:, s])
                    tick()
            lanes.join()
            del logp_BSV  # before the next block's are made
        for cell in cells:
            cell.finish()


class _Lanes:
    """Streams on which cells advance side by side; on a CPU there are none, and one follows the other."""

    def __init__(self, device: torch.device, cells: int):
        self.device = device
        self.streams = [torch.cuda.Stream(device) for _ in range(cells)] if device.type == "cuda" else []

    def over(self, cells: list["_Cell"]) -> Iterator[tuple["_Cell", AbstractContextManager]]:
        """Cells, each with the context in which it does its work."""
        for i, cell in enumerate(cells):
            yield cell, torch.cuda.stream(self.streams[i]) if self.streams else nullcontext()

    def fork(self) -> None:
        """All wait for what the current stream has been given."""
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream(self.device))

    def join(self) -> None:
        """The current stream waits for all."""
        for stream in self.streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)


class _Sums:
    """Sums over predicted tokens, in float64 on the device: nothing waits for the device inside the loop."""

    def __init__(self, device):
        self.nll, self.kl, self.agreed = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
        self.tokens = 0

    def add(self, logits_BV: torch.Tensor, next_B: torch.Tensor) -> torch.Tensor:
        """Adds how surprising the true next tokens are. Returns the log-probabilities, fp32 [B, V]."""
        logp_BV = logits_BV.float().log_softmax(-1)
        self.nll -= logp_BV.gather(1, next_B[:, None]).sum(dtype=torch.float64)
        self.tokens += next_B.shape[0]
        return logp_BV

    @property
    def perplexity(self) -> float:
        nll = float(self.nll) / self.tokens
        return math.exp(nll) if nll < 700 else math.inf


class _Cell(_Sums):
    """One policy at one budget: its cache now, and its sums so far."""

    def __init__(self, policy: Policy, budget: Budget, device):
        super().__init__(device)
        self.policy, self.budget, self.cache, self.forward = policy, budget, None, None
        self.peak, self.mean = 0, 0.0

    def begin(self, model, rows: int) -> None:
        """A new cache for so many sequences; on a GPU, where the policy allows, with its step as a CUDA graph."""
        self.cache = _static_cache(model, self.policy, self.budget, rows) if _records(model.device) else None
        if self.cache is not None:
            self.forward = DecodeStep(model, self.cache)
            return
        cache = self.cache = bounded_cache(model, self.policy, self.budget)
        given = with_cache(model, cache)
        self.forward = lambda token_B: model(token_B[:, None], use_cache=True, **given).logits[:, -1]

    def step(
        self, token_B: torch.Tensor, next_B: torch.Tensor, teacher_logp_BV: torch.Tensor, teacher_best_B: torch.Tensor
    ) -> None:
        """Feeds one token to each sequence and measures what it predicts."""
        self.measure(self.forward(token_B), next_B, teacher_logp_BV, teacher_best_B)

    def measure(
        self, logits_NV: torch.Tensor, next_N: torch.Tensor, teacher_logp_NV: torch.Tensor, teacher_best_N: torch.Tensor
    ) -> None:
        """Adds N predictions, against the full model's log-probabilities and its most probable tokens."""
        logq_NV, logp_NV = self.add(logits_NV, next_N), teacher_logp_NV
        # Where a model masks part of its vocabulary, both are -inf and their difference is no number.
        kl_NV = torch.where(logp_NV > -math.inf, logp_NV.exp() * (logp_NV - logq_NV), 0.0)
        self.kl += kl_NV.sum(dtype=torch.float64)
        self.agreed += (logits_NV.argmax(-1) == teacher_best_N).sum()

    def finish(self) -> None:
        """The batch is through: remember its peak, free its slots."""
        self.peak, self.mean = max(self.peak, self.cache.peak_tokens), max(self.mean, self.cache.peak_mean_tokens)
        self.cache = self.forward = None

    def row(self, budget: Budget) -> Row:
        return Row(
            policy=self.policy.name,
            budget=budget.tokens,
            kl=float(self.kl) / self.tokens,
            perplexity=self.perplexity,
            top1_agreement=float(self.agreed) / self.tokens,
            tokens=self.tokens,
            peak_tokens_per_head=self.peak,
            mean_tokens_per_head=self.mean,
        )


def _records(device: torch.device) -> bool:
    return device.type == "cuda"


def _static_cache(model, policy: Policy, budget: Budget, rows: int):
    """A static cache, or None for policies, budgets and models that can have none."""
    try:
        return bounded_cache(model, policy, budget, rows=rows) if policy.bounded else None
    except ValueError:
        return None


def _grid(policies, budgets, device) -> list[tuple[_Cell, Budget]]:
    """Policies x budgets. An unbounded policy is one cell whatever the budget, and not measured twice."""
    grid = []
    for policy in map(make, policies):
        cells = [_Cell(policy, Budget.of(budget), device) for budget in budgets]
        grid += [(cell if policy.bounded or policy.selects else cells[0], cell.budget) for cell in cells]
    return grid
