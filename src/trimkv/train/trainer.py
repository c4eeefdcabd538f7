"""transformers' Trainer for gates: accelerate, DDP, accumulation, resuming and logging come with it."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..gates.attach import attach, new_gates
from ..gates.files import GateSet, load_gates, save_gates
from ..hf.model import why_unserved
from ..ranks import ranks_of
from .config import GateConfig
from .data import collate
from .student import Student

# What writing raises on a full disk: Python, safetensors and torch have their own ways.
UNWRITABLE = (OSError, SafetensorError, RuntimeError)


class SaveError(OSError):
    """Something could not be written, a full disk for instance. What was saved before is as it was."""


class GateTrainer(Trainer):
    """Trains the gates of a ``Student``; checkpoints hold gates, optimizer and schedule, never the model."""

    trains = "gates"

    def __init__(self, student: Student, config: GateConfig, output: str | Path, dataset, meta: dict, callbacks=()):
        self.settings, self.meta, self.sums, self.counted = config, meta, {}, 0
        args = TrainingArguments(
            output_dir=str(output),
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulation,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": config.min_learning_rate},
            warmup_steps=config.warmup_steps,
            max_grad_norm=config.clip,
            save_strategy="steps" if config.save_steps else "no",
            save_steps=config.save_steps or 500,
            save_total_limit=2,
            logging_steps=1,
            seed=config.seed,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_drop_last=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            report_to=list(config.report_to) or "none",
            use_cpu=next(student.parameters()).device.type == "cpu",
            ddp_find_unused_parameters=False,
        )
        if args.n_gpu > 1:  # several GPUs without a launcher: one works, as DataParallel cannot run hooks on copies
            args._n_gpu = 1
        student.process, student.processes = args.process_index, args.world_size
        super().__init__(
            model=student,
            args=args,
            train_dataset=dataset,
            data_collator=collate,
            callbacks=[_Steps(student), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # losses are means over a batch already
        self.history: list[dict] = []

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            settings = self.settings
            weights, biases = self.model.gate_parameters()
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": weights, "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
                    {"params": biases, "lr": settings.bias_learning_rate, "weight_decay": 0.0},
                ],
                betas=settings.betas,
                eps=settings.epsilon,
            )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        for name, value in out.items():
            if name != "loss":
                self.sums[name] = self.sums.get(name, 0.0) + value
        self.counted += 1
        return (out["loss"], out) if return_outputs else out["loss"]

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.counted:
            own = torch.stack([torch.as_tensor(value) for value in self.sums.values()]) / self.counted
            means = self.accelerator.reduce(own.float(), "mean")  # over processes: every one of them logs
            logs = {**logs, **dict(zip(self.sums, means.tolist(), strict=True))}
            self.sums, self.counted = {}, 0
            self.history.append({"step": self.state.global_step, **logs})
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except UNWRITABLE as error:
            shutil.rmtree(folder, ignore_errors=True)
            mend = "earlier checkpoints are as they were: make room, then resume"
            raise SaveError(f"{folder}: cannot be saved ({error}); {mend}") from error

    def save_result(self) -> None:
        """Writes what was trained, where it comes from, and training.json."""
        output = Path(self.args.output_dir)
        try:
            self._save_final(output)
            self.settings.save(output)
        except UNWRITABLE as error:
            mend = "make room, then resume" if self.settings.save_steps else "make room and start anew"
            raise SaveError(f"{output}: {self.trains} cannot be saved ({error}); {mend}") from error

    def _save_final(self, output: Path) -> None:
        self._save(str(output))

    def _save(self, output_dir=None, state_dict=None):
        meta = {**self.meta, "trained_budget": self.settings.budget, **self.provenance()}
        save_gates(self.model.model, output_dir or self.args.output_dir, **meta)

    @property
    def tokens_per_step(self) -> int:
        settings = self.settings
        return settings.batch_size * settings.accumulation * settings.context * self.args.world_size

    def provenance(self) -> dict:
        """What a trained set's json says of its training."""
        import transformers

        settings, step = self.settings, self.state.global_step
        return {
            "context": settings.context,
            "steps": step,
            "tokens": step * self.tokens_per_step,
            "seed": settings.seed,
            "settings": asdict(settings),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def _load_optimizer_and_scheduler(self, checkpoint):
        """As the Trainer does, which asks torch for a device "cpu:0" where several processes share a CPU."""
        if checkpoint is not None:
            for part, name in ((self.optimizer, "optimizer.pt"), (self.lr_scheduler, "scheduler.pt")):
                part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        _put(self.model, load_gates(resume_from_checkpoint))


class _Steps(TrainerCallback):
    """Tells the student which step begins."""

    def __init__(self, student: Student):
        self.student = student

    def on_step_begin(self, args, state, control, **kwargs):
        self.student.begin_step(state.global_step)


def train(
    model,
    dataset,
    config: GateConfig,
    output: str | Path,
    gates: GateSet | None = None,
    resume: bool = False,
    meta: dict | None = None,
    callbacks=(),
) -> dict:
    """Trains gates for a model and writes them to a folder.

    Args:
        model: a transformers decoder model, on its device. Its weights are frozen, and stay as they are.
        dataset: samples as ``PackedTexts`` gives them.
        config: the training's numbers.
        output: folder for gates.safetensors, gates.json, training.json and checkpoints.
        gates: to start from; None starts with new ones, initialised for ``config.context``.
        resume: go on from the last checkpoint in ``output``.
        meta: provenance for gates.json, such as the data's names.

    Returns:
        steps, tokens, seconds, tokens_per_second, final_kl, final_capacity, final_occupancy (means of the last ten
        steps), output, history (one entry per step of this run).

    Raises:
        ValueError: a model without layers for gates, or one that is sharded over processes; gates that do not fit;
            nothing to resume from, or a checkpoint of another model or training.
        SaveError: a checkpoint or the result could not be written.
    """
    checkpoint = checkpoint_in(output, resume)
    if ranks_of(model) is not None:
        raise ValueError("gates are trained on a model that is whole in each process; load it without a tp_plan")
    reason = why_unserved(model)
    if reason is not None:
        raise ValueError(f"gates can't be trained for {type(model).__name__}: it {reason}")
    if checkpoint is not None:
        gates = _resumed(checkpoint, config, (meta or {}).get("base_model"))
    if gates is None:
        gates = new_gates(model, config.kind, config.intermediate_size, config.context, config.seed)
    attach(model, gates)
    student = Student(model, config)
    arguments = student, config, output, dataset, meta or {}, callbacks
    return fit(GateTrainer, arguments, checkpoint, ("kl", "capacity", "occupancy"))


def fit(trainer_class: type[GateTrainer], arguments: tuple, checkpoint: Path | None, names: Sequence[str]) -> dict:
    """Trains, writes the result and gives the model back.

    Args:
        arguments: of ``trainer_class``; the first is the student.
        checkpoint: to go on from.
        names: logged values whose means over the last ten steps are returned, as final_NAME.

    Returns:
        steps, tokens, seconds, tokens_per_second, the final values, output, history.
    """
    student, _, output, *_ = arguments
    start = time.perf_counter()
    try:
        trainer = trainer_class(*arguments)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        seconds = time.perf_counter() - start
        if trainer.is_world_process_zero():
            trainer.save_result()
    finally:
        student.release()
    logged = [entry for entry in trainer.state.log_history if any(name in entry for name in names)][-10:]
    return {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * trainer.tokens_per_step,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(len(trainer.history) * trainer.tokens_per_step / seconds, 1),
        **{f"final_{name}": _mean(entry.get(name) for entry in logged) for name in names},
        "output": str(output),
        "history": trainer.history,
    }


def checkpoint_in(output: str | Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, None without ``resume``. ValueError if there is none."""
    checkpoint = _last_checkpoint(Path(output)) if resume else None
    if resume and checkpoint is None:
        raise ValueError(f"{output}: no checkpoint to resume from")
    return checkpoint


def check_model(checkpoint: Path, theirs: str | None, ours: str | None) -> None:
    """ValueError if a checkpoint is of another model."""
    if ours and theirs and Path(ours).name.lower() != Path(theirs).name.lower():
        raise ValueError(f"{checkpoint} is of {theirs}, not of {ours}")


def _last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that is whole: one that a crash cut off lacks the state, which is written last."""

    def whole(folder: Path) -> bool:
        try:
            return "global_step" in json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            return False

    steps = {int(f.name.removeprefix("checkpoint-")): f for f in output.glob("checkpoint-[0-9]*") if whole(f)}
    return steps[max(steps)] if steps else None


def _resumed(checkpoint: Path, config: GateConfig, base_model: str | None) -> GateSet:
    """The gates of a checkpoint, if it is one of this training."""
    gates = load_gates(checkpoint)
    check_model(checkpoint, gates.base_model, base_model)
    then = gates.meta.get("gate"), gates.intermediate_size
    if then != (config.kind, config.intermediate_size):
        raise ValueError(f"{checkpoint} has gates {then[0]} of size {then[1]}: resume with these, or start anew")
    return gates


def _mean(values) -> float | None:
    """Of the last steps; None for a loss that was not asked for."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def _put(student: Student, gates: GateSet) -> None:
    """Loads gates into a student in place, so that the optimizer keeps its parameters."""
    for module in student.modules_with_gates:
        module.retention_gate.load_state_dict(gates.layers[module.layer_idx])
