"""One file a policy, one table of names."""

from dataclasses import replace

from ...budget import Budget
from .base import Policy
from .expected_attention import ExpectedAttention, ExpectedAttention32
from .full import Full
from .h2o import H2O, H2ONormalised
from .keydiff import KeyDiff
from .knorm import Knorm
from .lagkv import LagKV
from .locret import Locret
from .r_kv import RKV
from .random import Random
from .seer_attention_r import SeerAttentionR
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM, StreamingLLMCache
from .tova import Tova
from .trimkv import TrimKV

POLICIES: dict[str, type[Policy]] = {
    cls.name: cls
    for cls in (
        Full,
        TrimKV,
        StreamingLLM,
        StreamingLLMCache,
        H2O,
        H2ONormalised,
        Tova,
        KeyDiff,
        Knorm,
        LagKV,
        SnapKV,
        RKV,
        Locret,
        SeerAttentionR,
        ExpectedAttention,
        ExpectedAttention32,
        Random,
    )
}


def make(policy: "str | Policy", **options) -> Policy:
    """A policy from its name and options, or the policy itself.

    Raises:
        ValueError: unknown name (the message lists the known ones), or options the policy does not take.
    """
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; known policies: {', '.join(sorted(POLICIES))}")
    try:
        return POLICIES[policy](**options)
    except TypeError as error:
        raise ValueError(f"policy {policy}: {error}") from None


def as_published(policy: str, budget: int | Budget, chunk: int | None) -> tuple[Policy, Budget, int | None]:
    """A policy, with budget and chunk, as its paper's code had it, where that is another thing than here: prompts that
    attend in full, decoding beyond the budget between evictions, other ages or positions.

    By default every policy evicts before a token attends and after every chunk of a prompt, so that all can be compared
    at one budget. What was published often exceeds it; peaks are counted either way.

    Args:
        budget: a buffer in it is kept as it is.
        chunk: of a prompt; kept where prompts were published in chunks.

    Raises:
        ValueError: unknown policy.
    """
    budget, form = Budget.of(budget), make(policy).published
    if form is None:
        return make(policy), budget, chunk
    if not budget.buffer:
        budget = replace(budget, buffer=form.buffer)
    budget = replace(budget, split=form.split or budget.split)
    return make(form.name or policy, **form.options), budget, None if form.whole_prompt else chunk
