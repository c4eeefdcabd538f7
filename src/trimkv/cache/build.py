"""A bounded cache for a stock model."""

from ..budget import Budget
from ..hf.model import attention_modules, cache_layers, is_full_attention, key_heads, numbers, why_unserved
from ..ranks import Part, part_of
from .bounded import BoundedCache
from .hooks import install
from .layers import BoundedLayer
from .policies import POLICIES, Policy, make
from .rotation import rotation_of
from .shared import Share, SharedLayer
from .static import check_static, keys_of

DEFAULT_CHUNK = 512


def bounded_cache(
    model,
    policy: str | Policy = "trimkv",
    budget: int | Budget = 256,
    chunk: int | None = DEFAULT_CHUNK,
    rows: int | None = None,
) -> BoundedCache:
    """A cache that keeps at most ``budget`` tokens per KV head, for ever.

    Puts a pre-hook on the model's decoder (``detach`` takes it off) and selects the attention that reads slots. Several
    threads may each have a cache of their own on one model, beside others that call the model without one. Layers with
    sliding windows or linear attention keep their own, already bounded, cache layers.

    Tensor parallel, for models that do not fit one GPU: start N processes with torchrun, load the model in each with
    ``from_pretrained(..., distributed_config=DistributedConfig(tp_plan="auto"))`` (or ``tp_plan="auto"``), and call
    ``attach`` and this function in all of them, as in one process. Each keeps the slots of its own KV heads: bytes that
    the cache tells are those of one process, tokens are per head as ever. N must divide the number of KV heads; budgets
    of scope "layer" and "global", and policies with trained heads of their own, are refused.

    Args:
        model: a transformers decoder model.
        policy: a name from ``trimkv policies`` or a Policy.
        budget: tokens per KV head, or a Budget.
        chunk: tokens of a prompt that attend together before an eviction: a prompt never holds more than
            budget + chunk tokens per head. None lets every forward attend in full and evicts after it. A budget of
            scope "global" takes no longer forwards than this: feed prompts with ``prefill``.
        rows: makes the cache static, for this many rows: all slots are allocated now, and a decode step is the same
            launches for ever, whatever the ages of its rows, so that it can be captured as a CUDA graph. Rows whose
            attention_mask [R, 1] is 0 in a decode step stay as they are, bit for bit. Rows are filled by ``copy_row``
            or ``restore`` and emptied by ``clear_rows``, in place. Without position_ids, each row goes on at its own
            position. Policy full takes the budget for the longest sequence, and its oldest tokens go beyond that.

    Raises:
        ValueError: unknown policy, impossible budget, missing gates, a model that cannot be served from slots, or whose
            KV heads cannot be shared out over the processes that hold it.
    """
    policy, budget = make(policy), Budget.of(budget)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    if budget.tokens <= policy.sinks + budget.recent and policy.bounded:
        raise ValueError(
            f"budget: {budget.tokens} tokens leave no room beside the {policy.sinks} sinks of {policy.name} and "
            f"{budget.recent} recent tokens"
        )
    check_sharing(policy, budget)
    if rows is not None:
        check_static(model, policy, budget, rows)
    layers = make_layers(model, policy, budget, chunk)
    if rows is not None:
        modules = attention_modules(model)
        for layer in layers:
            layer.allocate(keys_of(model, modules[layer.layer_idx]), rows)
    cache = BoundedCache(layers)
    cache.hooks = install(model)
    return cache


def check_sharing(policy: Policy, budget: Budget) -> None:
    """Refuses a budget that heads shall share by scores that say nothing across heads.

    Raises:
        ValueError: such a policy; the message names those that can.
    """
    if budget.shared and policy.bounded and not policy.comparable:
        known = ", ".join(name for name, cls in POLICIES.items() if cls.comparable)
        raise ValueError(
            f"budget: the scores of {policy.name} mean nothing across heads, so they cannot share a budget; use scope "
            f"head, or a policy whose scores can be compared ({known})"
        )


def make_layers(model, policy: Policy, budget: Budget, chunk: int | None) -> list:
    """One cache layer per model layer: slots for full attention, transformers' own for the rest."""
    name, reason = type(model).__name__, why_unserved(model)
    if reason is not None:
        raise ValueError(f"a bounded cache can't serve {name}: it {reason}")
    layers, modules = cache_layers(model), attention_modules(model)
    slot_layers = [i for i, layer in enumerate(layers) if is_full_attention(layer)]
    parts = {i: part_of(model, modules[i], key_heads(model, modules[i])[0]) for i in slot_layers}
    _check_parts(parts, policy, budget)
    if "log_beta" in policy.needs:
        bare = [i for i in slot_layers if getattr(modules[i], "retention_gate", None) is None]
        if bare:
            raise ValueError(
                f"policy {policy.name} needs retention gates and {name} has none on layers {numbers(bare)}; "
                "call trimkv.attach(model, gates) first, or choose a policy without training such as streaming_llm"
            )
    policy = policy.fitted({i: modules[i] for i in slot_layers})
    turns = {i: rotation_of(model, modules[i]) for i in slot_layers} if "rotation" in policy.needs else {}
    shares = _shares(policy, budget, {i: modules[i] for i in slot_layers})
    budgets = dict(zip(slot_layers, budget.layers(shares, policy.sinks), strict=True))
    if budget.shared and policy.bounded:
        slots = shared_layers(policy, budgets, chunk)
    else:
        slots = {i: BoundedLayer(policy, budgets[i], chunk, i, turns.get(i), parts[i]) for i in slot_layers}
    return [slots.get(i, layer) for i, layer in enumerate(layers)]


def _shares(policy: Policy, budget: Budget, modules: dict) -> list[float]:
    """How much of the budget each layer should have, as its gate says, where the policy goes by gates or is to.

    Raises:
        ValueError: there are no gates to go by.
    """
    goes_by_gates = budget.split == "gates" or (budget.split == "trained" and "log_beta" in policy.needs)
    if not goes_by_gates or not policy.bounded:
        return [1.0] * len(modules)
    gates = [getattr(module, "retention_gate", None) for module in modules.values()]
    if None in gates:
        raise ValueError("budget: split gates needs a model with gates: call trimkv.attach(model, gates) first")
    return [gate.share for gate in gates]


def _check_parts(parts: dict[int, Part], policy: Policy, budget: Budget) -> None:
    """Refuses what needs all heads of a layer in one process.

    Raises:
        ValueError: with what to take instead.
    """
    if all(part.whole for part in parts.values()):
        return
    if budget.shared:
        raise ValueError(
            f"budget: heads in different processes cannot share a budget of scope {budget.scope}; use scope head"
        )
    if policy.head:
        raise ValueError(
            f"policy {policy.name} has trained heads that read all heads of a layer, and here they are shared out over "
            "processes; choose another policy, or load the model in one process"
        )


def shared_layers(policy: Policy, budgets: dict[int, Budget], chunk: int | None) -> dict[int, SharedLayer]:
    """Layers by number, in the order of the forward pass, whose heads share a budget by layer or all together."""
    one = Share(len(budgets)) if next(iter(budgets.values())).scope == "global" else None
    return {
        i: SharedLayer(policy, budget, chunk, i, one or Share(1), 0 if one is None else place)
        for place, (i, budget) in enumerate(budgets.items())
    }
