"""The folder of a training: what it holds, whether a training may write there, and from where one goes on."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from .. import fingerprint

RECORD = "training.json"  # settings, and what the training is made of; in the folder and in each checkpoint
SHARES = "shares.json"  # a measurement that belongs to the gates beside it
RESULTS = ("gates.safetensors", "gates.json", "heads.safetensors", "heads.json", "trimkv_weights.pth")


def holds(folder: str | Path) -> str:
    """What a training would replace in this folder, in words; "" if there is nothing."""
    folder = Path(folder)
    found = [name for name in RESULTS if (folder / name).exists()]
    steps = sorted(checkpoints(folder))
    if found:
        return f"{'heads' if found[0].startswith('heads') else 'gates'}{_provenance(folder)}"
    if steps:
        return f"an unfinished training, saved at step {steps[-1]:,}; --resume goes on with it"
    return ""


def check_free(folder: str | Path, overwrite: bool) -> None:
    """ValueError if the folder holds a training or its result, and nobody said that it may be replaced."""
    there = "" if overwrite else holds(folder)
    if there:
        raise ValueError(f"{folder} holds {there}: name another folder, or --overwrite (overwrite=True) to replace it")


def begin(folder: str | Path, config, made_of: dict, fresh: bool) -> None:
    """Notes what the training is made of; a fresh one takes the checkpoints of another away.

    Gates or heads of another training stay until the new ones are written in their places.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for checkpoint in folder.glob("checkpoint-[0-9]*") if fresh else ():
        shutil.rmtree(checkpoint)
    record(folder, config, made_of)


def record(folder: str | Path, config, made_of: dict) -> None:
    """Writes training.json."""
    path = Path(folder) / RECORD
    half = path.with_name(f"{RECORD}.part")
    half.write_text(json.dumps({**asdict(config), "made_of": made_of}, indent=2) + "\n")
    half.replace(path)


def checkpoint_in(folder: str | Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, None without ``resume``. ValueError if there is none."""
    found = checkpoints(Path(folder)) if resume else {}
    if resume and not found:
        raise ValueError(f"{folder}: no checkpoint to resume from")
    return found[max(found)] if found else None


def checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint, of those that are whole: one that a crash cut off lacks the state, which is written last."""

    def whole(folder: Path) -> bool:
        try:
            return "global_step" in json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            return False

    return {int(f.name.removeprefix("checkpoint-")): f for f in folder.glob("checkpoint-[0-9]*") if whole(f)}


def check_same(checkpoint: Path, made_of: dict) -> None:
    """ValueError if a checkpoint is of another training: the message says what differs, on both sides.

    Args:
        made_of: all of what the training is made of, or the part that is known so far.
    """
    try:
        then = json.loads((checkpoint / RECORD).read_text())["made_of"]
        differ = fingerprint.differences(then, made_of)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{checkpoint} does not say what training it is of ({RECORD} is missing or damaged): start anew in another "
            "folder, or with --overwrite"
        ) from None
    if differ:
        raise ValueError(
            f"{checkpoint} is of another training: {fingerprint.line(differ)}. Resume with the options it had, name "
            "another folder, or start anew with --overwrite"
        )


def _provenance(folder: Path) -> str:
    """Of gates or heads: " for MODEL (300 steps on a.txt)", as far as it is known."""
    for name in ("gates.json", "heads.json"):
        try:
            meta = json.loads((folder / name).read_text())
            model, steps, data = (meta.get(key) for key in ("base_model", "steps", "data"))
        except (OSError, ValueError, AttributeError):
            continue
        made = [f"{steps:,} steps" if isinstance(steps, int) else "", f"on {str(data)[:60]}" if data else ""]
        made = " ".join(part for part in made if part)
        return (f" for {model}" if model else "") + (f" ({made})" if made else "")
    return ""
