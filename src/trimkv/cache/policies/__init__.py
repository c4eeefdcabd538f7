"""One file a policy, one table of names."""

from .base import Policy
from .full import Full
from .random import Random
from .streaming_llm import StreamingLLM
from .trimkv import TrimKV

POLICIES: dict[str, type[Policy]] = {cls.name: cls for cls in (Full, TrimKV, StreamingLLM, Random)}


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
