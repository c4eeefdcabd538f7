"""The trained baselines for smollm2, LocRet and SeerAttention-R: the data of its gates, as many tokens, and texts as
long. Their first stage is 1,700 steps where the gates have two; the others are shaped like the gates' third and fourth.
Bundled are LocRet's heads after the first stage, as the others made them worse (docs/LOG.md), and SeerAttention-R's
after the last.

    python recipes/smollm2.py prepare --source DATA --output texts             # once, and answer, as for the gates
    python recipes/smollm2_baselines.py --data texts --output heads            # one GPU; writes heads/METHOD/STAGE
    torchrun --nproc-per-node 2 recipes/smollm2_baselines.py ...               # the same batches on two GPUs
    python recipes/smollm2_baselines.py --data texts --output heads --from DIR --stages longer longest   # DIR/METHOD

What differs from the published settings, in favour of the baselines unless said otherwise:
- widths: a retaining head of 64 instead of 1024 and block gates of 32 instead of 128, so that the weights (3.7 MB and
  2.2 MB in fp16) are no larger than those of our gates;
- blocks of 16 tokens instead of 64: a budget of 64 is then 4 blocks and not 1;
- batches of 16,384 tokens and 2,900 steps; higher learning rates for the narrow heads, and a warm-up of a tenth of
  LocRet's steps instead of two thirds.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import smollm2

from trimkv.gates.head_sets import bundled_heads, load_heads
from trimkv.train import processes, run_folder
from trimkv.train.config import GateConfig
from trimkv.train.data import PackedTexts
from trimkv.train.heads import HeadConfig, train_heads

METHODS = ("locret", "seer_attention_r")


def stages(method: str) -> dict[str, HeadConfig]:
    """The training of one baseline: every stage has the steps, contexts and batches of gates' stages."""
    decay, eviction, longer, longest = (stage() for stage in smollm2.STAGES.values())
    return {
        "first": _config(method, decay, decay.steps + eviction.steps, learning_rate=3e-3),
        "longer": _config(method, longer, longer.steps, learning_rate=1e-3),
        "longest": _config(method, longest, longest.steps, learning_rate=1e-3),
    }


def _config(method: str, gates: GateConfig, steps: int, learning_rate: float) -> HeadConfig:
    same = {"steps": steps, "batch_size": gates.batch_size, "context": gates.context, "seed": gates.seed}
    same |= {"learning_rate": learning_rate, "save_steps": 250, "compile": True}
    if method == "locret":
        return HeadConfig.locret(width=64, warmup_steps=steps // 10, **same)
    return HeadConfig.seer_attention_r(width=32, block_size=16, **same)


def train_baselines(
    data: Path,
    output: Path,
    model_name: str = "smollm2",
    methods=METHODS,
    only=None,
    begin: str | None = None,
    steps: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Trains the baselines one after the other and writes output/METHOD/STAGE.

    Args:
        only: names of stages; None takes all.
        begin: heads that the first of these stages starts from: "bundled", or a folder with one of each METHOD.
        steps: of each stage, in place of its own.
        resume: the first of these stages goes on from its last checkpoint.
        overwrite: replace what the folders of the stages hold.

    Raises:
        ValueError: a stage's folder holds heads, or a training; said before the first stage begins.
    """
    folders = [output / method / name for method in methods for name in stages(method) if not only or name in only]
    for folder in folders[1:] if resume else folders:
        run_folder.check_free(folder, overwrite)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimkv import embedded

    place, device = embedded.resolve(model_name), "cpu"
    if torch.cuda.is_available():
        processes.take_gpu()
        device = "cuda"
    tokenizer = AutoTokenizer.from_pretrained(place)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype).to(device)
    torch.set_float32_matmul_precision("high")  # the heads are fp32
    texts = "49 public-domain novels, GSM8K train, MATH without MATH-500, chats made of them, the model's own answers"
    meta = {"data": texts, "base_model": model_name}
    if model_name == "smollm2":
        meta["base_sha256"] = embedded.weights_sha256()
    for method in methods:
        heads = begin and load_heads(bundled_heads(method)["smollm2"] if begin == "bundled" else Path(begin) / method)
        for name, settings in stages(method).items():
            if only and name not in only:
                continue
            settings = replace(settings, batch_size=settings.batch_size // processes.count())
            if steps:
                settings = replace(settings, steps=steps)
            samples = settings.steps * settings.batch_size * settings.accumulation * processes.count()
            dataset = PackedTexts(
                smollm2.sources(data), tokenizer, settings.context, seed=settings.seed, samples=samples
            )
            before = {"earlier_stages": _stages_of(heads.meta)} if heads else {}
            shown = smollm2.printer(20, ("loss", "grad_norm"))
            folder = output / method / name
            result = train_heads(model, dataset, settings, folder, heads, resume, meta | before, [shown], overwrite)
            history, resume = result.pop("history"), False
            if processes.number() == 0:
                print(json.dumps({"stage": name, **result, "last": history[-1]}), flush=True)
            processes.wait()
            heads = load_heads(folder)
    processes.leave()


def _stages_of(meta: dict) -> list[dict]:
    """What heads have gone through so far."""
    return [*meta.get("earlier_stages", ()), {name: meta[name] for name in ("settings", "steps", "tokens")}]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2", help="alias or folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--stages", nargs="+", choices=tuple(stages(METHODS[0])), help="[default: all]")
    parser.add_argument("--from", dest="begin", help="heads to start from: bundled, or a folder with METHOD in it")
    parser.add_argument("--steps", type=int, help="of each stage")
    parser.add_argument("--resume", action="store_true", help="the first stage from its last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the heads that --output holds")
    args = parser.parse_args()
    chosen = args.methods, args.stages, args.begin
    try:
        train_baselines(args.data, args.output, args.model, *chosen, args.steps, args.resume, args.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
