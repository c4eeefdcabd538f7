"""transformers' Trainer for gates: accelerate, DDP, accumulation, resuming and logging come with it."""

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
from . import run_folder
from .config import GateConfig
from .data import collate
from .made_of import made_of, settings_of
from .student import Student

# What writing raises on a full disk: Python, safetensors and torch have their own ways.
UNWRITABLE = (OSError, SafetensorError, RuntimeError)


class SaveError(OSError):
    """Something could not be written, a full disk for instance. What was saved before is as it was."""


class GateTrainer(Trainer):
    """Trains the gates of a ``Student``; checkpoints hold gates, optimizer and schedule, never the model."""

    trains = "gates"

    def __init__(
        self, student: Student, config: GateConfig, output: str | Path, dataset, meta: dict, made: dict, callbacks=()
    ):
        self.settings, self.meta, self.made_of, self.sums, self.counted = config, meta, made, {}, 0
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

    def begin(self, fresh: bool) -> None:
        """Notes in the folder what is trained there."""
        output = Path(self.args.output_dir)
        try:
            run_folder.begin(output, self.settings, self.made_of, fresh)
        except OSError as error:
            raise SaveError(f"{output}: cannot be written ({error.strerror or error})") from error

    def save_result(self) -> None:
        """Writes what was trained, and where it comes from."""
        output = Path(self.args.output_dir)
        try:
            self._save_final(output)
            (output / run_folder.SHARES).unlink(missing_ok=True)  # of gates that are not there any more
        except UNWRITABLE as error:
            mend = "make room, then resume" if self.settings.save_steps else "make room and start anew"
            raise SaveError(f"{output}: {self.trains} cannot be saved ({error}); {mend}") from error

    def _save_final(self, output: Path) -> None:
        self._write(output)

    def _save(self, output_dir=None, state_dict=None):
        """A checkpoint's gates, and what they are made of."""
        self._write(Path(output_dir or self.args.output_dir))
        run_folder.record(output_dir or self.args.output_dir, self.settings, self.made_of)

    def _write(self, folder: Path) -> None:
        meta = {**self.meta, "trained_budget": self.settings.budget, **self.provenance()}
        save_gates(self.model.model, folder, overwrite=True, **meta)

    @property
    def tokens_per_step(self) -> int:
        settings = self.settings
        return settings.batch_size * settings.accumulation * settings.context * self.args.world_size

    def provenance(self) -> dict:
        """What a trained set's json says of its training."""
        import transformers

        settings, step = self.settings, self.state.global_step
        named = settings_of(settings)
        return {
            "context": settings.context,
            "steps": step,
            "tokens": step * self.tokens_per_step,
            "seed": settings.seed,
            "settings": asdict(settings),
            "made_of": {name: value for name, value in self.made_of.items() if name not in named},
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
    overwrite: bool = False,
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
        overwrite: replace a training, or gates, that ``output`` holds.

    Returns:
        steps, tokens, seconds, tokens_per_second, final_kl, final_capacity, final_occupancy (means of the last ten
        steps), output, history (one entry per step of this run).

    Raises:
        ValueError: a model without layers for gates, or one that is sharded over processes; gates that do not fit;
            nothing to resume from, or a checkpoint of another model or training; a folder that holds gates or a
            training already.
        SaveError: a checkpoint or the result could not be written.
    """
    checkpoint = place(output, resume, overwrite)
    if ranks_of(model) is not None:
        raise ValueError("gates are trained on a model that is whole in each process; load it without a tp_plan")
    reason = why_unserved(model)
    if reason is not None:
        raise ValueError(f"gates can't be trained for {type(model).__name__}: it {reason}")
    made = made_of(model, dataset, config, "trimkv", (meta or {}).get("base_model"), gates)
    if checkpoint is not None:
        run_folder.check_same(checkpoint, made)
        gates = load_gates(checkpoint)
    if gates is None:
        gates = new_gates(model, config.kind, config.intermediate_size, config.context, config.seed)
    attach(model, gates)
    student = Student(model, config)
    arguments = student, config, output, dataset, meta or {}, made, callbacks
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
        if trainer.is_world_process_zero():
            trainer.begin(fresh=checkpoint is None)
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


def place(output: str | Path, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint in ``output`` to go on from, None for a new training.

    Raises:
        ValueError: nothing to resume from, or something there that nobody wants to lose.
    """
    if not resume:
        run_folder.check_free(output, overwrite)
    return run_folder.checkpoint_in(output, resume)


def _mean(values) -> float | None:
    """Of the last steps; None for a loss that was not asked for."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def _put(student: Student, gates: GateSet) -> None:
    """Loads gates into a student in place, so that the optimizer keeps its parameters."""
    for module in student.modules_with_gates:
        module.retention_gate.load_state_dict(gates.layers[module.layer_idx])
