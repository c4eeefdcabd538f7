"""One file a policy, one table of names."""

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
