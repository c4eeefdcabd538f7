"""What slots cost on one GPU: the decode kernel, products, layers, Qwen3-4B's decode step, flatness, a long prompt.

    python benchmarks/decode_gpu.py                   # about four minutes, a good part of it compiling
    python benchmarks/decode_gpu.py --parts linear --sweep     # other blocks of the products, to choose by; minutes
    python benchmarks/decode_gpu.py --parts kernel,step --shape tiny --budget 16 --context 40    # a quick look

Each part is measured as ``trimkv bench`` measures, one after the other: an error in one leaves the others be, and the
file is written after every row.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from record import RESULTS

from trimkv.bench import attention, decode, linear, models, prefill
from trimkv.bench.measure import clean, copy_bandwidth, matmul_rate
from trimkv.cache.build import bounded_cache
from trimkv.cache.graph import DecodeStep
from trimkv.cli.provenance import environment

STEPS, REPEAT = 64, 3
ROOM = (REPEAT + 2) * STEPS  # tokens that a measurement of decode adds


class Run:
    """The device, the model, and the file that grows."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.start = time.perf_counter()
        self.bandwidth = copy_bandwidth(self.device)
        self.matmul = matmul_rate(self.device, self.dtype)
        self.result = {
            "command": f"python benchmarks/decode_gpu.py {' '.join(sys.argv[1:])}".strip(),
            "environment": environment(),
            "shape": args.shape,
            "copy_bandwidth": self.bandwidth,
            "matmul_rate": self.matmul,
            "parts": {},
        }
        args.output.mkdir(parents=True, exist_ok=True)
        self.path = args.output / f"{args.name}.json"
        self._model = None

    @property
    def model(self):
        if self._model is None:
            self._model = models.build(self.args.shape, str(self.device), self.dtype)
        return self._model

    def part(self, name: str, rows: Iterator[dict]) -> None:
        """Goes through a part's rows; whatever happens, the file has those before."""
        entry = self.result["parts"][name] = {"rows": []}
        begin = time.perf_counter()
        try:
            for row in rows:
                entry["rows"].append(row)
                print(f"{time.perf_counter() - self.start:6.1f} s  {name}: {json.dumps(row)}", flush=True)
                self.save()
        except Exception:
            entry["error"] = traceback.format_exc()
            print(f"{name}: {entry['error']}", flush=True)
        entry["seconds"] = round(time.perf_counter() - begin, 1)
        clean(self.device)
        self.save()

    def save(self) -> None:
        self.path.write_text(json.dumps(self.result, indent=1) + "\n")


def kernel(run: Run) -> Iterator[dict]:
    """The decode kernel alone, inputs rotated: fraction_of_floor is its fraction of copy bandwidth."""
    for batch, budget in ((64, 1024), (16, 4096), (8, 1024), (4, 1024), (1, 1024)):
        given = attention.Options(run.args.shape, (batch,), (budget,))
        yield from attention.measure(given, run.device, run.dtype, run.bandwidth)


def products(run: Run) -> Iterator[dict]:
    """Each product of a layer, and of the output layer, weights rotated: fraction_of_floor is that of copy."""
    rows = (8, 64) if run.args.sweep else (1, 4, 8, 16, 64)
    given = linear.Options(run.args.shape, rows, sweep=run.args.sweep)
    yield from linear.measure(given, run.device, run.dtype, run.bandwidth)


def layer(run: Run) -> Iterator[dict]:
    """One layer within a step: what eight more layers cost, by eight."""
    few, more = 4, 12
    times = {}
    for layers in (few, more):
        model = models.build(run.args.shape, str(run.device), run.dtype, layers=layers)
        for system in run.args.systems.split(","):
            given = _options(run, (4, 8, 64), system, (run.args.context,))
            for row in decode.measure(model, given, run.bandwidth):
                times[system, row["batch"], layers] = row
                yield {**row, "layers": layers}
        del model
        clean(run.device)
    for system, batch, layers in list(times):
        rows = [times[system, batch, n] for n in (few, more)]
        if layers == few and all(row["ms"] for row in rows):
            ms, floor = ((rows[1][key] - rows[0][key]) / (more - few) for key in ("ms", "floor_ms"))
            found = {"ms_per_layer": ms, "floor_ms_per_layer": floor, "fraction_of_floor": floor / ms}
            yield {"system": system, "batch": batch, **found}


def step(run: Run) -> Iterator[dict]:
    """Decode at M = 1,024: trimkv behind a long context, and policy full with as many slots."""
    M, long = run.args.budget, run.args.context
    batches = (4, 8, 64)
    for system in run.args.systems.split(","):
        yield from _decode(run, batches, system, (long,))
    yield from _decode(run, batches, "full", (max(M - ROOM // 2, 1),))  # M tokens are held in the middle of it
    yield from _decode(run, (4,), "full", (long,))


def flat(run: Run) -> Iterator[dict]:
    """ms per token at far positions."""
    yield from _decode(run, (4,), "trimkv", (1_000, 100_000, 1_000_000))


def _options(run: Run, batches: tuple, system: str, contexts: tuple) -> decode.Options:
    on_gpu = run.device.type == "cuda"
    return decode.Options(contexts, batches, run.args.budget, (system,), STEPS, REPEAT, compile=on_gpu, fused=True)


def _decode(run: Run, batches: tuple, system: str, contexts: tuple) -> Iterator[dict]:
    yield from decode.measure(run.model, _options(run, batches, system, contexts), run.bandwidth)


def prompt(run: Run) -> Iterator[dict]:
    """A long prompt, M = 4,096; stock attention takes it in one forward pass."""
    weights = sum(p.nbytes for p in run.model.parameters())
    for system in ("trimkv", "stock-dynamic"):
        given = prefill.Options((run.args.prompt,), (1,), 4096, 4096, (system,))
        for row in prefill.measure(run.model, given, run.matmul):
            over = None if row["peak_bytes"] is None else row["peak_bytes"] - weights
            yield {**row, "peak_bytes_above_weights": over}


@torch.no_grad()
def profile(run: Run) -> Iterator[dict]:
    """Where the time of a captured fused step goes: kernels of ten replays, the largest first."""
    cache = bounded_cache(run.model, "trimkv", run.args.budget, rows=4)
    one = DecodeStep(run.model, cache, fused=True)
    token = torch.zeros(4, dtype=torch.long, device=run.device)
    for _ in range(3):
        one(token)
    with torch.profiler.profile() as seen:
        for _ in range(10):
            one(token)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
    events = [e for e in seen.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    yield {"launches_per_step": sum(e.count for e in events) / 10}
    for event in events[:25]:
        us = event.self_device_time_total / 10
        yield {"kernel": event.key[:120], "launches": event.count / 10, "us_per_step": round(us, 1)}


PARTS = {
    **{"kernel": kernel, "linear": products, "layer": layer, "step": step},
    **{"flat": flat, "profile": profile, "prompt": prompt},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--shape", default="qwen3-4b")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--context", type=int, default=32_786)
    parser.add_argument("--prompt", type=int, default=131_072)
    parser.add_argument("--systems", default="trimkv,trimkv-compiled", help="of parts layer and step")
    parser.add_argument("--sweep", action="store_true", help="of part linear: other blocks, at 8 and 64 rows")
    parser.add_argument("--name", default="decode_gpu", help="of the file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the file")
    args = parser.parse_args()
    names = args.parts.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}; known are {', '.join(PARTS)}")
    run = Run(args)
    for name in names:
        run.part(name, PARTS[name](run))
    print(json.dumps(run.result))


if __name__ == "__main__":
    main()
