"""What the matrix products of a decode step cost, alone: ours with what is folded in, cuBLAS with the products only."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import device as devices
from ..attention import reference
from ..linear import products
from .measure import Wrong, replayed, row
from .models import GATE_WIDTH, config_of

SYSTEMS = ("trimkv", "cublas")
PRODUCTS = ("projections", "output", "feed_forward", "down", "head")
ROTATED = 400e6  # bytes of different weights that are gone through, more than a cache holds
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# BN, BK, warps, stages, and programs a multiprocessor by which columns are split.
BLOCKS = (
    *((16, 256, 4, 4), (32, 128, 4, 5), (32, 256, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3)),
    *((64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3), (128, 64, 4, 5), (128, 128, 8, 3)),
)
PROGRAMS = (0, 1, 2, 3, 4)


@dataclass
class Options:
    """What is measured: ``products`` of a layer of ``shape`` for so many ``rows``; ``sweep``: other blocks, too."""

    shape: str
    rows: tuple[int, ...]
    products: tuple[str, ...] = PRODUCTS
    systems: tuple[str, ...] = SYSTEMS
    repeat: int = 20
    sweep: bool = False


@torch.no_grad()
def measure(options: Options, device: torch.device, dtype: torch.dtype, bandwidth: float) -> Iterator[dict]:
    """A row for each product, number of rows and system; its fraction_of_floor is its fraction of copy bandwidth."""
    torch.manual_seed(0)
    for name in options.products:
        matrices = _matrices(options.shape, name, device, dtype)
        for rows in options.rows:
            where = {"product": name, "batch": rows, "context": 0}
            for system in options.systems:

                def one(system=system, rows=rows, name=name, matrices=matrices) -> dict:
                    return _time(system, name, matrices, rows, options, bandwidth)

                yield row(system, where, one, device)
            if options.sweep and device.type == "cuda":
                yield from _sweep(one_of=matrices, name=name, rows=rows, where=where, o=options, bandwidth=bandwidth)


def widths(shape: str, name: str) -> tuple[int, list[int]]:
    """Columns of a product's matrices, and the rows of each."""
    config = config_of(shape)
    E, intermediate, Q, H = (
        getattr(config, x) for x in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    D = getattr(config, "head_dim", None) or E // Q
    return {
        "projections": (E, [Q * D, H * D, H * D, GATE_WIDTH]),
        "output": (Q * D, [E]),
        "feed_forward": (E, [intermediate, intermediate]),
        "down": (intermediate, [E]),
        "head": (E, [config.vocab_size]),
    }[name]


def _matrices(shape: str, name: str, device, dtype) -> list[list[torch.Tensor]]:
    """Sets of a product's matrices: so many that none is still in a cache when its turn comes again."""
    K, Ns = widths(shape, name)
    moved = sum(Ns) * K * dtype.itemsize
    copies = 1 + int(ROTATED / moved) if device.type == "cuda" else 1
    return [[torch.randn(N, K, device=device, dtype=dtype) / K**0.5 for N in Ns] for _ in range(copies)]


def _given(name: str, weights: list[torch.Tensor], rows: int) -> dict:
    """Arguments of ``products.linear`` as in a layer."""
    first = weights[0]
    (N, K), like = first.shape, {"device": first.device, "dtype": first.dtype}
    x, ones = torch.randn(rows, K, **like), torch.ones(max(N, K), **like)
    if name in ("output", "down"):
        counters = torch.zeros(4096, dtype=torch.int32, device=first.device)
        residual = torch.randn(rows, N, **like)
        return dict(x=x, weights=weights, residual_BN=residual, norm=(ones[:N], 1e-6), counters=counters)
    activation = {"projections": products.SILU_LAST, "feed_forward": products.GATED}.get(name, products.PLAIN)
    biases = [None] * len(weights)
    if name == "projections":
        biases[-1] = torch.ones(len(weights[-1]), **like)
    counters = torch.zeros(4096, dtype=torch.int32, device=first.device)
    normed = products.norm_input(x, ones[:K], 1e-6)
    return dict(x=normed, weights=weights, biases=biases, activation=activation, counters=counters)


def _time(system: str, name: str, matrices: list, rows: int, o: Options, bandwidth: float) -> dict:
    given = _given(name, matrices[0], rows)
    moved = sum(w.nbytes for w in matrices[0])
    if system == "cublas":
        x = given["x"].x if isinstance(given["x"], products.Normed) else given["x"]
        calls = [lambda weights=weights: [F.linear(x, w) for w in weights] for weights in matrices]
    else:
        error = _error(given)
        if error > TOLERANCE[matrices[0][0].dtype]:
            raise Wrong(f"output differs by {error:.2g} (relative)")
        calls = [lambda weights=weights: products.linear(**{**given, "weights": weights}) for weights in matrices]
    ms = replayed(calls, matrices[0][0].device, o.repeat)
    return {"ms": ms, "tokens_per_second": rows / ms * 1e3, "floor_ms": moved / bandwidth * 1e3, "moved_bytes": moved}


def _error(given: dict) -> float:
    x = given["x"]
    x, squares, eps = x if isinstance(x, products.Normed) else (x, None, 0.0)
    biases = given.get("biases") or [None] * len(given["weights"])
    norm = given.get("norm")
    truth = products.linear_reference(
        *(x, given["weights"], [b for b in biases if b is not None], [b is not None for b in biases], squares, eps),
        *(given.get("activation", products.PLAIN), given.get("residual_BN"), None, None),
    )[0]
    got = products.linear(**given)
    return reference.relative_error(got if norm is None else got[0], truth)


def _sweep(one_of: list, name: str, rows: int, where: dict, o: Options, bandwidth: float) -> Iterator[dict]:
    """The same product by other blocks; what does not compile is a row with an error. ``plan`` goes into TUNED."""
    from ..linear import products_triton

    weights = one_of[0]
    activation = products.GATED if name == "feed_forward" else products.PLAIN
    K, BM = weights[0].shape[1], products_triton.plan(weights[0][:rows], weights, activation).BM
    key = sum(w.shape[0] for w in weights), K, BM
    before, seen = products_triton.TUNED.pop(key, None), set()
    multiprocessors = devices.multiprocessors(weights[0])
    try:
        for (BN, BK, warps, stages), programs in itertools.product(BLOCKS, PROGRAMS):
            gated = activation == products.GATED
            tiles = sum(-(-w.shape[0] // BN) for w in (weights[:1] if gated else weights))
            blocks = -(-K // BK)
            splits = max(1, min(round(programs * multiprocessors / tiles), blocks // 2))
            splits = -(-blocks // -(-blocks // splits))
            plan = BN, BK, splits, warps, stages
            bytes_ = stages * BK * (BM + BN * (1 + gated)) * weights[0].itemsize
            if plan in seen or bytes_ > devices.HOPPER_BYTES:
                continue
            seen.add(plan)
            products_triton.TUNED[key] = plan
            found = row("trimkv", where, lambda: _time("trimkv", name, one_of, rows, o, bandwidth), weights[0].device)
            yield {**found, "key": key, "plan": plan}
    finally:
        products_triton.TUNED.pop(key, None)
        if before is not None:
            products_triton.TUNED[key] = before
