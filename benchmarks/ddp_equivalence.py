"""Two processes with one batch each against one process with accumulation 2: the loss curves have to be the same.

    python benchmarks/ddp_equivalence.py                          # a tiny random model
    python benchmarks/ddp_equivalence.py --model smollm2 --steps 30 --context 1024
    python benchmarks/ddp_equivalence.py --stage eviction

On two GPUs where there are two, else on the CPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

VALUES = ("loss", "kl", "capacity", "occupancy", "grad_norm", "learning_rate")


class Samples(torch.utils.data.Dataset):
    """Random tokens, as training texts are packed: some samples hold two documents, some end in padding."""

    def __init__(self, vocabulary: int, context: int, length: int):
        self.vocabulary, self.context, self.length = vocabulary, context, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        T = self.context
        ids = torch.randint(3, self.vocabulary, (T,), generator=torch.Generator().manual_seed(index))
        start, labels, mask = torch.zeros(T, dtype=torch.long), ids.clone(), torch.ones(T, dtype=torch.bool)
        labels[0] = -100
        if index % 2:
            border = T // 3 + index % (T // 3)
            start[border:] = border
            labels[border] = -100
        if index % 3 == 0:
            end = T - T // 5
            start[end:] = torch.arange(end, T)
            labels[end:], mask[end:] = -100, False
        return {"input_ids": ids, "labels": labels, "start": start, "mask": mask}


def model_of(name: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    from trimkv import embedded

    if name != "tiny":
        return AutoModelForCausalLM.from_pretrained(embedded.resolve(name))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 256}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=2, **sizes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # at its default initialisation attention is nearly uniform and gates hardly matter
    return model


def work(args) -> None:
    """One training, in as many processes as the launcher started; the first writes the curve."""
    from trimkv.train import processes
    from trimkv.train.config import GateConfig
    from trimkv.train.trainer import train

    model = model_of(args.model).to(getattr(torch, args.dtype))
    if args.device == "cuda":
        processes.take_gpu()
        model.to("cuda")
    config = GateConfig(
        budget=args.context / 8,
        context=args.context,
        steps=args.steps,
        batch_size=2,
        accumulation=args.accumulation,
        stage=args.stage,
        intermediate_size=16,
        learning_rate=1e-2,
        warmup_steps=1,
        budgets=(max(2, args.context // 16), args.context // 2),
    )
    samples = config.steps * config.batch_size * config.accumulation * processes.count()
    dataset = Samples(model.config.get_text_config().vocab_size, args.context, samples)
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, dataset, config, folder)
    processes.leave()
    if processes.number() == 0:
        Path(args.curve).write_text(json.dumps({"processes": processes.count(), **result}))


def launch(processes: int, accumulation: int, arguments: list[str], folder: Path) -> dict:
    """The result of a training in so many processes."""
    curve = folder / f"{processes}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [__file__, *arguments, "--accumulation", str(accumulation), "--curve", str(curve)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads(curve.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny (random), smollm2, a folder or a hub id")
    parser.add_argument("--stage", choices=["decay", "eviction"], default="decay")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there are two GPUs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder for the JSON file (default: results)")
    parser.add_argument("--accumulation", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--curve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device is None:
        args.device = "cuda" if torch.cuda.device_count() >= args.processes else "cpu"
    if args.curve:
        work(args)
        return
    import record

    names = ("model", "stage", "steps", "context", "dtype", "device")
    arguments = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
    with tempfile.TemporaryDirectory() as folder:
        several = launch(args.processes, 1, arguments, Path(folder))
        single = launch(1, args.processes, arguments, Path(folder))
    assert (several["processes"], single["processes"]) == (args.processes, 1), "the launcher started others"
    curves = {
        "several": [{name: entry[name] for name in VALUES} for entry in several["history"]],
        "single": [{name: entry[name] for name in VALUES} for entry in single["history"]],
    }
    pairs = list(zip(curves["several"], curves["single"], strict=True))
    difference = {name: max(_relative(a[name], b[name]) for a, b in pairs) for name in VALUES}
    result = {name: getattr(args, name) for name in names}
    speeds = {"several": several["tokens_per_second"], "single": single["tokens_per_second"]}
    result |= {"processes": args.processes, "largest_relative_difference": difference, "tokens_per_second": speeds}
    name = f"ddp_equivalence_{args.device}_{Path(args.model).name}_{args.stage}"
    record.save(name, {**result, "curves": curves}, args.output)


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-12)


if __name__ == "__main__":
    main()
