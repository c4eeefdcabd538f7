"""How much of a budget should each layer have? Measured layer by layer, then shared out.

Layers differ: some look back a few words, some need hundreds of tokens. With one number of slots for all of them the
former waste what the latter lack. Here each layer alone is bounded while all others see everything, at several budgets;
what that costs in KL is all but additive over layers, so that slots go where the next one saves most.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..budget import Budget
from ..cache.policies import Policy, make
from ..cache.replay import replay_cache, replayable
from ..hf.calls import with_cache
from ..hf.model import decoder_of
from .layerwise import POSITIONS, Head

LEAST, MOST = 0.5, 2.0
STEP = 1 / 32  # of the mean number of slots
NOTHING = 1e-9  # nats: less is noise


@torch.inference_mode()
def layer_costs(
    model,
    ids_NT: torch.Tensor,
    budgets: Sequence[int],
    policy: str | Policy = "trimkv",
    batch_size: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """KL(full || only this layer bounded) in nats, averaged over tokens: fp32 [L, budgets].

    Args:
        ids_NT: int64 [N, T], sequences of equal length.
        budgets: tokens per head of the layer that is bounded, each less than T.
        policy: one whose scores need no later queries.
        progress: called as ``progress(done, total)``, in passes over the texts.

    Raises:
        ValueError: a budget that evicts nothing, or a policy that cannot be replayed.
    """
    T, policy = ids_NT.shape[1], make(policy)
    if not budgets or not all(0 < budget < T for budget in budgets):
        raise ValueError(f"budgets must be from 1 to {T - 1} for sequences of {T} tokens, got {list(budgets)}")
    if not policy.bounded or not replayable(policy, Budget(1)):
        raise ValueError(f"policy {policy.name} must be fed token by token, or evicts nothing")
    decoder, batches = decoder_of(model), ids_NT.to(model.device).split(batch_size)
    layers = len(replay_cache(model, policy, T).slot_layers)
    costs, done = torch.zeros(layers, len(budgets)), 0
    for ids_BT in batches:
        whole = decoder(input_ids=ids_BT, use_cache=False)
        head = Head(model, type(whole))
        for i in range(layers):
            for n, tokens in enumerate(budgets):
                cache = replay_cache(model, policy, Budget(T, split="even"))
                layer = cache.slot_layers[i]
                layer.budget = replace(layer.budget, tokens=tokens)
                hidden = decoder(input_ids=ids_BT, **with_cache(model, cache)).last_hidden_state
                costs[i, n] += _kl(head, whole.last_hidden_state.flatten(0, 1), hidden.flatten(0, 1))
                done += 1
                progress(done, layers * len(budgets) * len(batches))
    return costs / ids_NT.numel()


def share_out(
    costs_LN: torch.Tensor, budgets: Sequence[int], means: Sequence[int], least: float = LEAST, most: float = MOST
) -> list[float]:
    """Shares of the L layers, 1 is the mean, that cost least over several mean budgets.

    Between the measured budgets a cost is taken to fall as a power, and beyond them to go on so. Each mean budget
    counts by what its cost falls to, relative to an even split.

    Args:
        costs_LN: ``layer_costs``.
        budgets: those it was measured at, rising, at least two.
        means: slots per head, on average, that the shares shall be good for.
        least, most: limits of a share.

    Raises:
        ValueError: limits around which no shares of mean 1 can lie.
    """
    if not 0 < least <= 1 <= most:
        raise ValueError(f"shares from {least} to {most} cannot have the mean 1")
    rows = [_falling(row) for row in costs_LN.tolist()]
    even = [sum(_cost(row, budgets, mean) for row in rows) for mean in means]

    def cost(layer: int, steps: int) -> float:
        found = (
            _cost(rows[layer], budgets, steps * STEP * mean) / whole for mean, whole in zip(means, even, strict=True)
        )
        return sum(found)

    L, low, high = len(rows), math.ceil(least / STEP), math.floor(most / STEP)
    steps = [low] * L
    gain = [cost(i, low) - cost(i, low + 1) for i in range(L)]
    for _ in range(round(L / STEP) - low * L):
        i = max((i for i in range(L) if steps[i] < high), key=gain.__getitem__)
        steps[i] += 1
        gain[i] = cost(i, steps[i]) - cost(i, steps[i] + 1)
    return [number * STEP for number in steps]


def _kl(head: Head, full_NE: torch.Tensor, bounded_NE: torch.Tensor) -> float:
    """The sum over positions."""
    total = 0.0
    for full, bounded in zip(full_NE.split(POSITIONS), bounded_NE.split(POSITIONS), strict=True):
        truth, found = (head(x).float().log_softmax(-1) for x in (full, bounded))
        total += F.kl_div(found, truth, reduction="sum", log_target=True).item()
    return total


def _falling(costs: list[float]) -> list[float]:
    """The costs of one layer without what noise has added: a larger budget costs less."""
    found = [max(cost, NOTHING) for cost in costs]
    for n in range(len(found) - 2, -1, -1):
        found[n] = max(found[n], found[n + 1] * 1.01)
    return found


def _cost(costs: list[float], budgets: Sequence[int], tokens: float) -> float:
    """Of a layer at any budget, by the two measured ones that it lies between, or that are nearest."""
    n = min(max(sum(budget <= tokens for budget in budgets) - 1, 0), len(budgets) - 2)
    (low, high), (first, last) = budgets[n : n + 2], costs[n : n + 2]
    return first * (tokens / low) ** (math.log(last / first) / math.log(high / low))
