"""The slot kernels on a GPU against torch's attention over the same tensors, and against the bandwidth of a copy.

    python benchmarks/slot_attention.py            # a few minutes, most of it compiling
    python benchmarks/slot_attention.py --sweep    # also other numbers of splits and block sizes, to choose by

Decode: one step of one layer, which writes, attends and finds the next slot. Many steps over different stores lie in
one CUDA graph, more than 100 MB of them, so that neither the L2 cache nor the host takes part. Chunk: new tokens over
slots and themselves. Nothing is timed unless it equals the plain reference.
"""

import argparse
import itertools
import sys

import torch
import torch.nn.functional as F
from record import save

from trimkv.attention import slots, slots_triton
from trimkv.attention.reference import relative_error
from trimkv.bench.attention import decode_step
from trimkv.bench.measure import copy_bandwidth, graph_milliseconds

SHAPE = "qwen3-4b"  # whose layers have
H, G, D = 8, 4, 128
ROWS, SLOTS = (1, 4, 8, 16, 64), (256, 1024, 4096)
CHUNKS = ((1, 512, 1024), (1, 1024, 4096), (1, 4096, 4096), (4, 512, 1024))  # rows, tokens, slots
TOLERANCE = 1e-2  # relative RMS, bf16
ROTATED = 160e6  # bytes of different stores that are gone through
BLOCKS = ((32, 2, 4), (32, 4, 3), (32, 4, 4), (32, 4, 6), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 3), (128, 8, 2))
SWEPT = ((4, 1024), (8, 1024), (64, 1024))  # rows, slots: all others are measured as they are


def step(B: int, M: int) -> dict:
    """Arguments of a decode step over full slots, by name."""
    given = decode_step(SHAPE, B, M, torch.device("cuda"), torch.bfloat16)
    given["position"] = torch.rand(B, H, M, device="cuda").argsort(-1).int()
    return given


def expect(good: bool, what: str) -> None:
    if not good:
        sys.exit(f"wrong: {what}. No times.")


def gate_decode(B: int, M: int) -> float:
    """The relative error of a step; exits if it, the store or the next slot is wrong."""
    given = step(B, M)
    given["position"][:, :, M // 2 :: 3] = -1
    pair = [{name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()} for _ in range(2)]
    got = slots_triton.decode(*pair[0].values(), sinks=4, recent=8)
    truth = slots_triton.decode_reference(*pair[1].values(), sinks=4, recent=8)
    error = relative_error(got.out, truth.out)
    expect(error < TOLERANCE, f"output at B {B} M {M}, relative error {error:.1e}")
    expect(torch.equal(got.next_slot, truth.next_slot), f"next slot at B {B} M {M}")
    expect(all(torch.equal(pair[0][n], pair[1][n]) for n in slots_triton.STORE), f"store at B {B} M {M}")
    return error


def measure_decode(B: int, M: int, copy: float, repeat: int, sweep: bool) -> dict:
    error = gate_decode(B, M)
    one = step(B, M)
    kv = one["k"].nbytes + one["v"].nbytes
    moved = sum(x.nbytes for x in one.values() if isinstance(x, torch.Tensor))
    moved += 2 * one["q"].nbytes + one["slot"].nbytes  # the output, and what is written into the store
    stores = [one] + [step(B, M) for _ in range(max(1, int(ROTATED / kv)))]

    def time(function) -> float:
        return graph_milliseconds([lambda given=given: function(given) for given in stores], repeat)

    counters = torch.zeros(B * H, dtype=torch.int32, device="cuda")

    def kernel(joins=True, **options):
        lent = counters if joins else None  # as a static cache lends them
        return lambda given: slots_triton.decode(*given.values(), counters=lent, **options)

    def sdpa(given):
        q = given["q"].view(B, H, G, D)
        return F.scaled_dot_product_attention(q, given["k"], given["v"], scale=given["scaling"])

    def rates(ms: float, bytes_: int) -> dict:
        rate = bytes_ / ms * 1e3
        return {"us": round(ms * 1e3, 2), "gb_per_s": round(rate / 1e9, 1), "of_copy": round(rate / copy, 3)}

    result = {
        "rows": B,
        "slots": M,
        "mb": round(moved / 1e6, 2),
        "stores": len(stores),
        "relative_error": error,
        "decode": rates(time(kernel(sinks=4)), moved),
        "decode_joined_apart": rates(time(kernel(sinks=4, joins=False)), moved),
        "decode_no_empty": rates(time(kernel(sinks=4, any_empty=False)), moved),
        "decode_no_search": rates(time(kernel(score="none", any_empty=False)), moved),
        "decode_with_probabilities": rates(time(kernel(sinks=4, probabilities=True)), moved),
        "sdpa_only_attends": rates(time(sdpa), kv),
    }
    result["decode_over_sdpa"] = round(result["decode"]["us"] / result["sdpa_only_attends"]["us"], 2)
    if sweep:
        result["sweep"] = sweep_decode(time, kernel)
        result["best"] = min(result["sweep"], key=lambda found: found.get("us", float("inf")))
    print({key: value["us"] if isinstance(value, dict) and "us" in value else value for key, value in result.items()})
    return result


def sweep_decode(time, kernel) -> list[dict]:
    """Microseconds by blocks, splits and the place of the join; what fails says so."""
    found, before = [], dict(slots_triton.DECODE)
    try:
        for config in BLOCKS:
            slots_triton.DECODE[D] = config
            for splits, joins in ((None, True), (1, True), *itertools.product((2, 3, 4, 6, 8, 16), (True, False))):
                one = {"block_warps_stages": config, "splits": splits, "joins": joins}
                try:
                    one["us"] = round(time(kernel(sinks=4, splits=splits, joins=joins)) * 1e3, 2)
                except Exception as error:  # too much shared memory, mostly: the next ones go on
                    one["error"] = f"{type(error).__name__}: {str(error)[:100]}"
                found.append(one)
    finally:
        slots_triton.DECODE.update(before)
    return found


def measure_chunk(B: int, T: int, M: int, repeat: int) -> dict:
    given = step(B, M)
    q = torch.randn(B, T, H * G, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k_new, v_new = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    new_position = (M + torch.arange(T, device="cuda", dtype=torch.int32)).expand(B, T)
    k, v, position = (given[name] for name in ("k", "v", "position"))
    arguments = q, k_new, v_new, new_position, k, v, position, given["scaling"]
    mask = slots.causal_mask(T, M + T, "cuda")

    def together():
        return torch.cat([k, k_new], 2), torch.cat([v, v_new], 2)

    def sdpa(keys, values):
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=given["scaling"], enable_gqa=True)

    out, _ = slots_triton.attend_chunk(*arguments)
    truth, _ = slots_triton.attend_chunk_reference(*arguments)
    error = relative_error(out, truth)
    expect(error < TOLERANCE, f"chunk at B {B} T {T} M {M}, relative error {error:.1e}")
    copied = together()
    calls = {
        "chunk": lambda: slots_triton.attend_chunk(*arguments),
        "chunk_no_empty": lambda: slots_triton.attend_chunk(*arguments, any_empty=False),
        "sdpa_with_mask": lambda: sdpa(*copied),
        "concatenation_and_sdpa": lambda: sdpa(*together()),
        # What is left to win by another selection than topk.
        "selection_by_topk": lambda: slots.best(
            torch.cat([given["log_beta"], given["log_beta"][:, :, :T]], 2),
            torch.cat([position, position[:, :, :T]], 2),
            M,
        ),
    }
    operations = 4 * B * H * G * D * T * (M + (T + 1) / 2)
    result = {"rows": B, "tokens": T, "slots": M, "relative_error": error}
    for name, call in calls.items():
        ms = graph_milliseconds([call] * 5, repeat)
        result[f"{name}_us"] = round(ms * 1e3, 1)
        if name != "selection_by_topk":
            result[f"{name}_tflops"] = round(operations / ms / 1e9, 1)
    print(result)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="also other splits and block sizes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures GPU kernels: no CUDA device found")
    torch.manual_seed(0)
    copy = copy_bandwidth(torch.device("cuda"))
    shape = {"kv_heads": H, "group": G, "head_dim": D, "dtype": "bfloat16"}
    result = {**shape, "copy_gb_per_s": round(copy / 1e9, 1), "decode": [], "chunk": []}
    with torch.no_grad():
        for B, M in itertools.product(ROWS, SLOTS):
            result["decode"].append(measure_decode(B, M, copy, args.repeat, args.sweep and (B, M) in SWEPT))
            save("slot_attention", result)
        for given in CHUNKS:
            result["chunk"].append(measure_chunk(*given, args.repeat))
            save("slot_attention", result)


if __name__ == "__main__":
    main()
