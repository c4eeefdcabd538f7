"""The trained baselines for smollm2, LocRet and SeerAttention-R, on the data of its gates and as many tokens as their
first two stages had: 1,700 steps. The gates' third stage of 700 steps came later and is not matched; SeerAttention-R's
loss fell by 3 % in its last 500 steps.

    python recipes/smollm2.py prepare --source DATA --output texts             # once, and answer, as for the gates
    python recipes/smollm2_baselines.py --data texts --output heads            # one GPU; writes heads/METHOD
    torchrun --nproc-per-node 4 recipes/smollm2_baselines.py ...               # the same batches on four GPUs

What differs from the published settings, in favour of the baselines unless said otherwise:
- widths: a retaining head of 64 instead of 1024 and block gates of 32 instead of 128, so that the weights (3.7 MB and
  2.2 MB in fp16) are no larger than those of our gates;
- blocks of 16 tokens instead of 64: a budget of 64 is then 4 blocks and not 1;
- batches of 8 samples of 2,048 tokens and 1,700 steps; higher learning rates for the narrow heads,
  and a warm-up of a tenth of LocRet's steps instead of two thirds.
"""

import argparse
import json
from pathlib import Path

import smollm2

from trimkv.train import processes
from trimkv.train.data import PackedTexts
from trimkv.train.heads import HeadConfig, train_heads

METHODS = ("locret", "seer_attention_r")


def tokens_of_the_gates() -> int:
    """What smollm2's gates have seen in their first two stages."""
    stages = smollm2.decay(), smollm2.eviction()
    return sum(c.steps * c.batch_size * c.accumulation * c.context for c in stages)


def config(method: str, steps: int | None = None, batch_size: int = 8, context: int = 2048) -> HeadConfig:
    """The training of one baseline; as many tokens as the gates had unless ``steps`` are given."""
    steps = steps or round(tokens_of_the_gates() / (batch_size * context))
    same = {"steps": steps, "batch_size": batch_size // processes.count(), "context": context, "save_steps": 500}
    same["compile"] = True
    if method == "locret":
        return HeadConfig.locret(width=64, learning_rate=3e-3, warmup_steps=steps // 10, **same)
    return HeadConfig.seer_attention_r(width=32, block_size=16, learning_rate=3e-3, **same)


def train_baselines(data: Path, output: Path, model_name="smollm2", methods=METHODS, steps=None, resume=False) -> None:
    """Trains the baselines one after the other and writes output/METHOD."""
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
        settings = config(method, steps)
        samples = settings.steps * settings.batch_size * settings.accumulation * processes.count()
        dataset = PackedTexts(smollm2.sources(data), tokenizer, settings.context, seed=settings.seed, samples=samples)
        shown = smollm2.printer(20, ("loss", "grad_norm"))
        result = train_heads(model, dataset, settings, output / method, None, resume, meta, [shown])
        history = result.pop("history")
        if processes.number() == 0:
            print(json.dumps({**result, "last": history[-1]}), flush=True)
    processes.leave()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2", help="alias or folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint of the method")
    args = parser.parse_args()
    train_baselines(args.data, args.output, args.model, args.methods, args.steps, args.resume)


if __name__ == "__main__":
    main()
