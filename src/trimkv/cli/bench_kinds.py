"""The kinds of ``trimkv bench``: which systems each measures, and how it is started."""

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace

from ..extras import install_extra
from .errors import UserError, mendable

# Kind -> system -> what it is. Written down here, as ``--help`` must not wait for torch; a test compares.
SYSTEMS = {
    "decode": {
        "stock-dynamic": "transformers with its growing cache",
        "stock-static": "transformers with its static cache, compiled on a GPU",
        "full": "our slots, as many as there are tokens",
        "trimkv-compiled": "--budget slots, torch.compile in place of fused layers",
        "trimkv": "--budget slots, with trained gates' computation",
    },
    "prefill": {
        "stock-dynamic": "transformers, the whole prompt in one pass",
        "full": "our slots, as many as there are tokens, in chunks",
        "trimkv": "--budget slots, in chunks",
    },
    "attention": {
        "sdpa": "torch's scaled_dot_product_attention over as many keys",
        "trimkv": "our slots: writes the token, attends, finds the next victim",
    },
    "train": {
        "plain": "as `trimkv train` does it",
        "cuda-graph": "the whole step as one CUDA graph",
        "cuda-graph+compile": "and compiled layers, as `trimkv train --fast` does it",
    },
}


def epilog(kind: str) -> str:
    """What the systems of a kind are, for its help."""
    return "\b\nSystems:\n" + "\n".join(f"  {name:<20}{what}" for name, what in SYSTEMS[kind].items())


def systems(kind: str, compare: str | None) -> tuple[str, ...]:
    """The systems that --compare names; by default all, and plain steps for train."""
    known = tuple(SYSTEMS[kind])
    if not compare:
        return known[:1] if kind == "train" else known
    names = tuple(dict.fromkeys(name.strip() for name in compare.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise UserError(f"--compare {name}: systems of bench {kind} are {', '.join(known)}")
    if not names:
        raise UserError(f"--compare: name one of {', '.join(known)}")
    return names


def check(o: SimpleNamespace) -> None:
    """Refuses what a kind cannot measure, before anything is measured."""
    if o.what != "train":
        return
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(f"measuring training needs accelerate: {install_extra('train')}")
    from ..train.config import GateConfig

    for context in o.contexts:
        with mendable(doing=f"--budget {o.budgets[0]} --context {context}"):
            GateConfig(budget=o.budgets[0], context=context)


def rows(o: SimpleNamespace, made_of: dict, bandwidth: float, matmul: float) -> Iterator[dict]:
    """The rows of a measurement, as they are done."""
    from ..bench import attention, decode, models, prefill

    if o.what == "attention":
        given = attention.Options(o.shape, o.batches, o.budgets, o.systems)
        yield from attention.measure(given, o.place, o.tensor_type, bandwidth)
        return
    if o.what == "train":
        from ..bench import train

        given = train.Options(o.shape, o.contexts, o.batches, o.budgets[0], o.systems, o.steps)
        yield from train.measure(given, o.place, o.tensor_type, matmul)
        return
    model = models.build(o.shape, str(o.place), o.tensor_type)
    if o.what == "prefill":
        given = prefill.Options(o.contexts, o.batches, o.budgets[0], o.chunk, o.systems)
        yield from prefill.measure(model, given, matmul)
    else:
        how = {name: made_of[name] for name in ("compile", "fused")}
        given = decode.Options(o.contexts, o.batches, o.budgets[0], o.systems, o.steps, **how)
        yield from decode.measure(model, given, bandwidth)
