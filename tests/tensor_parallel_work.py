"""What one process and two have to agree on: run here by the test, and under torchrun by two processes.

torchrun --nproc-per-node 2 tests/tensor_parallel_work.py FOLDER     writes FOLDER/result-RANK.json
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import tiny
import trimkv
from alone import long, prompt
from trimkv import Budget, Engine
from trimkv.gates.attach import new_gates
from trimkv.gates.files import save_gates
from trimkv.gates.head_sets import attach_heads, new_heads

MODELS = {"qwen3": {}, "llama": {}, "phi3": {}}  # phi3's plan leaves all heads in every process
KINDS = {"qwen3": "rg", "llama": "rg2", "phi3": "rg3"}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
POLICIES = {
    "qwen3": ["trimkv", "streaming_llm", "h2o", "keydiff", "tova", "random"],
    "llama": ["trimkv", "streaming_llm", "h2o", "keydiff", "snapkv"],
    "phi3": ["trimkv", "tova"],
}
BUDGET, CHUNK = 12, 8
LENGTHS = ((5, 12), (30, 6), (13, 9), (21, 7))  # prompt, output


def make(folder: Path) -> None:
    """Models and gates as files, made once."""
    for name, changes in MODELS.items():
        model = tiny.build(name, **{**SIZES, **changes})
        model.save_pretrained(folder / name)
        for kind in {KINDS[name], *(("rg3",) if name == "llama" else ())}:
            gates = new_gates(model, kind, intermediate_size=16, training_length=16)
            for parameters in gates.layers.values():
                parameters["down_proj.weight" if kind == "rg3" else "linear2.weight"].mul_(200)
            save_gates(gates, folder / f"{name}-{kind}")
    tiny.build("llama", num_hidden_layers=1, num_key_value_heads=1).save_pretrained(folder / "mqa")


def load(folder: Path, name: str, several: bool):
    options = {"distributed_config": DistributedConfig(tp_plan="auto")} if several else {}
    return AutoModelForCausalLM.from_pretrained(folder / name, **options).eval()


def kept(cache) -> list:
    """Positions that each head holds, by layer and row: [L][B][H][...]."""
    return [
        [[sorted(p for p in head if p >= 0) for head in row] for row in layer.store.position.tolist()]
        for layer in cache.slot_layers
    ]


def generated(model, policy: str) -> dict:
    ids, mask = tiny.left_padded([0, 9], 24)
    cache = trimkv.bounded_cache(model, policy, BUDGET, chunk=CHUNK)
    sequences, _ = tiny.generate(model, ids, cache, new=20, mask=mask)
    return {"tokens": sequences.tolist(), "kept": kept(cache), "bytes": cache.nbytes}


def served(model, policy: str) -> dict:
    """Requests of mixed lengths on too few rows, greedy and drawn."""
    params = [long(n, temperature=0.8 * (i % 2), seed=i) for i, (_, n) in enumerate(LENGTHS)]
    with Engine(model, policy, BUDGET, rows=2, chunk=CHUNK, prefixes=1) as engine:
        engine.prefix(prompt(16, seed=1))
        prompts = [prompt(p) for p, _ in LENGTHS] + [prompt(16, seed=1) + prompt(4)]
        done = engine.generate(prompts, [*params, long(5)], progress=False)
        assert done[-1].reused_tokens == 16
        return {"tokens": [one.tokens for one in done], "kept": kept(engine.runner.cache), "memory": engine.memory}


def work(folder: Path, several: bool) -> dict:
    result = {}
    for name, policies in POLICIES.items():
        model = load(folder, name, several)
        trimkv.attach(model, folder / f"{name}-{KINDS[name]}")
        for policy in policies:
            result[f"{name} {policy} generate"] = generated(model, policy)
            if name != "phi3":
                result[f"{name} {policy} engine"] = served(model, policy)
        if name == "llama":
            trimkv.attach(model, folder / "llama-rg3")
            result["llama rg3 generate"] = generated(model, "trimkv")
    return result


def alone_in_time(folder: Path, rank: int) -> dict:
    """What happens at another time in each process: threads, cancelling, Ctrl-C; and draws without a seed."""
    model = load(folder, "qwen3", True)
    found = {}
    with Engine(model, "streaming_llm", BUDGET, rows=2, chunk=CHUNK) as engine:
        held, queue = [], engine._queue
        engine._queue = lambda requests: held.extend(requests) or queue(requests)
        drawn = engine.generate([prompt(5)] * 3, long(8, temperature=2.0), progress=False)
        found["drawn"] = [one.tokens for one in drawn]
        if rank == 0:  # the first process alone hears Ctrl-C
            take, pressed = engine._collect, []

            def collect(all_of_them):
                take(all_of_them)
                if len(held[4].tokens) >= 3 and not pressed:
                    pressed.append(os.kill(os.getpid(), signal.SIGINT))

            engine._collect = collect
        try:
            engine.generate([prompt(6), prompt(7)], long(10_000), progress=False)
        except KeyboardInterrupt:
            found["interrupted"] = True
        engine.step()
        found["left"] = [(one.result().finish_reason, one.tokens) for one in held[3:5]]

        engine.start()
        several = [engine.add(prompt(4 + i), long(10_000 if i == 1 else 20)) for i in range(4)]
        for i, _ in enumerate(several[1]):
            if i == (5 if rank == 0 else 2):
                several[1].cancel()
        found["threads"] = [(one.result().finish_reason, one.tokens) for one in several]
    return found


def refusals(folder: Path) -> dict[str, str]:
    model, mqa = load(folder, "qwen3", True), load(folder, "mqa", True)
    trimkv.attach(model, folder / "qwen3-rg")
    calls = {
        "scope": lambda: trimkv.bounded_cache(model, "trimkv", Budget(8, scope="layer")),
        "heads": lambda: attach_heads(model, new_heads(model, "locret", width=16)),
        "locret": lambda: trimkv.bounded_cache(model, "locret", 8),
        "save": lambda: save_gates(model, folder / "never"),
        "fused": lambda: Engine(model, "trimkv", 8, fused=True),
        "mqa cache": lambda: trimkv.bounded_cache(mqa, "streaming_llm", 8),
        "mqa engine": lambda: Engine(mqa, "streaming_llm", 8),
        "mqa gates": lambda: trimkv.attach(mqa, new_gates(mqa, intermediate_size=16)),
    }
    return {name: refused(call) for name, call in calls.items()}


def refused(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not refused"


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    result = {"work": work(folder, True), "refusals": refusals(folder), "time": alone_in_time(folder, rank)}
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    os._exit(0)  # all is said; a process was seen to abort while it took gloo's threads down


if __name__ == "__main__":
    main()
