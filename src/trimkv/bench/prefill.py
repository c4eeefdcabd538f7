"""What a prompt costs, and the memory at its worst."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from ..attention import reference
from ..cache.build import bounded_cache
from ..cache.prefill import prefill as feed
from ..hf.calls import with_cache
from .decode import TOLERANCE, _stock
from .measure import Wrong, milliseconds, row

SYSTEMS = ("stock-dynamic", "full", "trimkv")
GATE_PROMPT = 200


@dataclass
class Options:
    """What is measured.

    Attributes:
        contexts, batches: tokens of a prompt, and how many prompts at once.
        budget: M of system trimkv.
        chunk: tokens of a forward pass of our own systems; stock-dynamic takes the prompt in one.
        systems: of SYSTEMS.
    """

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    budget: int
    chunk: int = 4096
    systems: tuple[str, ...] = SYSTEMS
    repeat: int = 1


@torch.no_grad()
def measure(model, options: Options, matmul: float) -> Iterator[dict]:
    """A row for each context, batch and system. The floor is that of the arithmetic of one pass over the prompt."""
    wrong = {system: _error(model, system) for system in options.systems}
    for context in options.contexts:
        for batch in options.batches:
            where = {"context": context, "batch": batch, "budget": options.budget, "chunk": options.chunk}
            ids = torch.randint(3, model.config.vocab_size, (batch, context), device=model.device)
            for system in options.systems:

                def one(system=system, ids=ids) -> dict:
                    if wrong[system]:
                        raise wrong[system]
                    _read(model, system, ids[:, : 2 * options.chunk + 1], options.budget, options.chunk)  # compiles
                    ms = milliseconds(
                        lambda: _read(model, system, ids, options.budget, options.chunk),
                        *(model.device, options.repeat),
                        warm=0,
                    )
                    floor = _operations(model, system, ids.shape, options) / matmul * 1e3
                    return {"ms": ms, "tokens_per_second": ids.numel() / ms * 1e3, "floor_ms": floor}

                yield row(system, where, one, model.device)


def _read(model, system: str, ids: torch.Tensor, budget: int, chunk: int) -> torch.Tensor:
    if system == "stock-dynamic":
        _stock(model)
        return model(ids, logits_to_keep=1, **with_cache(model, DynamicCache(config=model.config))).logits[:, -1]
    cache = bounded_cache(model, system, budget, chunk=chunk)
    return feed(model, cache, ids, chunk=chunk)


def _operations(model, system: str, shape, o: Options) -> float:
    """Of products with weights, once a token, and of attention."""
    config, (rows, tokens) = model.config, shape
    linear = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = tokens / 2 if system != "trimkv" else min(o.budget, tokens) + min(o.chunk, tokens) / 2
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * dim * keys
    return rows * tokens * (2 * linear + attention)


def _error(model, system: str) -> Exception | None:
    """None if the last logits of a short prompt, with room for all of it, are those of the stock model."""
    try:
        ids = torch.randint(3, model.config.vocab_size, (2, GATE_PROMPT), device=model.device)
        error = reference.relative_error(
            _read(model, system, ids, GATE_PROMPT, 64), _read(model, "stock-dynamic", ids, 0, 0)
        )
    except (ValueError, torch.OutOfMemoryError) as error:  # said in this system's rows, and the others go on
        return type(error)(str(error))  # without a traceback, which would hold what this system allocated
    except Exception as error:
        return Wrong(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return None if error < TOLERANCE[model.dtype] else Wrong(f"logits differ by {error:.2g} (relative)")
