"""Compares our published names with what generations.py and loss_values.py found. Runs in our environment.

python compare.py FOLDER [--record FILE]      # FOLDER: the other scripts' JSON; exit status 1 if anything differs
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
import transformers

from peers.authors import loss_cases, ours
from peers.authors.cases import PACKAGE, REPOSITORY, all_cases

RECORDED = {"prompt": 60, "budget": (16, 4)}  # of the plain cases, those that go into the recorded file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the models are tiny
    transformers.utils.logging.disable_progress_bar()
    theirs = {}
    for code in (PACKAGE, REPOSITORY):
        theirs |= json.loads((args.folder / f"{code}.json").read_text())
    differ = compare_losses(json.loads((args.folder / "losses.json").read_text()))
    differ += compare_generations(theirs, args.record)
    sys.exit(1 if differ else 0)


def compare_losses(theirs: dict) -> int:
    worst = {}
    for name, values in theirs.items():
        mine = [
            loss_cases.our_capacity(s) if name == "capacity" else loss_cases.our_base(s, name)
            for s in range(len(values))
        ]
        worst[name] = max(abs(a - b) / abs(b) for a, b in zip(mine, values, strict=True))
        print(f"loss {name:10} {len(values)} inputs, largest relative difference {worst[name]:.1e}")
    return sum(value > 1e-5 for value in worst.values())


def compare_generations(theirs: dict, record: Path | None) -> int:
    texts, sets, bf16, recorded, weights = defaultdict(list), defaultdict(list), defaultdict(list), {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in all_cases():
            found = theirs.pop(case.name)
            folder = Path(scratch) / f"{case.model}-{case.gate}-{case.seed}"
            model, digest = ours.load(case, folder)
            weights |= {folder.name: digest} if digest else {}
            tokens, kept = ours.generate(case, model)
            texts[case.code].append(tokens == found["tokens"])
            sets[case.code] += [a == b for a, b in zip(heads(kept), heads(found["kept"]), strict=True)]
            if not (texts[case.code][-1] and kept == found["kept"]):
                print(f"differs: {case.name}")
            if "bf16" in found:
                mine = ours.forced(case, ours.load(case, folder, torch.bfloat16)[0], found["tokens"])
                for a, b in zip(heads(mine), heads(found["bf16"]), strict=True):
                    bf16[case.name].append(len(set(a) & set(b)) / len(b))
            if case.recent or case.turns > 1 or (case.prompt, (case.memory, case.buffer)) == tuple(RECORDED.values()):
                recorded[case.name] = {"tokens": found["tokens"], **summary(found["kept"])}
    assert not theirs, f"cases that only the other side has: {', '.join(theirs)}"
    for code in (PACKAGE, REPOSITORY):
        print(f"fp32, {code}: {sum(texts[code])} of {len(texts[code])} generations equal, ", end="")
        print(f"{sum(sets[code])} of {len(sets[code])} kept sets")
    report_bf16(bf16)
    if record:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        content = {"compared_with": versions, "weights": weights, "cases": recorded}
        record.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    return sum(not all(values) for values in (*texts.values(), *sets.values()))


def report_bf16(shares: dict[str, list[float]]) -> None:
    """Shares of kept tokens that are the same in bf16, where both read the fp32 text."""
    means = {name: sum(values) / len(values) for name, values in shares.items()}
    least = min(means, key=means.get)
    mean = sum(means.values()) / len(means)
    print(f"bf16: {100 * mean:.2f} % of kept tokens agree, per case {100 * means[least]:.2f} % ({least}) to ", end="")
    print(f"{100 * max(means.values()):.2f} %; {sum(m == 1 for m in means.values())} of {len(means)} cases in all")


def heads(kept: list) -> list:
    """Every kept set: forwards x layers x heads, in one list."""
    return [head for forward in kept for layer in forward for head in layer]


def summary(kept: list) -> dict:
    """The last kept sets, and a digest of those after each forward."""
    digests = [hashlib.sha256(json.dumps(sets).encode()).hexdigest()[:8] for sets in kept]
    return {"last": kept[-1], "digests": "".join(digests)}


if __name__ == "__main__":
    main()
