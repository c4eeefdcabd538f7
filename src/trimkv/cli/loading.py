"""From what was typed to a model that is ready: checks that cost nothing first, then torch, then the weights."""

import contextlib
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import click

from .errors import UserError, mendable, one_line

LEARNED = "trimkv"
UNTRAINED = "streaming_llm"  # needs nothing but positions


def check_model_name(name: str) -> None:
    """Refuses a folder that is not there or is no model, before anything slow starts."""
    from ..embedded import ALIAS

    if name == ALIAS:
        return
    if not name.strip():
        raise UserError("the model's name is empty")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: no config.json in this folder, so it is not a model")
    elif path.exists():
        raise UserError(f"{name}: a file, but a model is a folder, a Hugging Face id or the alias {ALIAS}")
    elif _is_path(name) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder")
    else:
        with status(f"looking for {name}"):
            _check_hub(name)


def import_torch() -> None:
    """The first slow moment of a command: nobody should look at an empty screen meanwhile."""
    with status("starting"):
        from ..cache import policies  # noqa: F401


@dataclass(frozen=True)
class Choice:
    """Who decides, with what.

    Attributes:
        policies: their names.
        gates: as ``attach`` takes them, or None where no policy needs them.
        heads: what ``attach_heads`` takes, for each baseline among the policies that has trained heads.
        remark: what was chosen on the user's behalf; to be said when the run starts, or nothing.
    """

    policies: tuple[str, ...]
    gates: object = None
    remark: str | None = None
    heads: tuple = ()


def choose(wanted: tuple[str, ...], model_name: str, gates: str, several: bool = False) -> Choice:
    """Which policies run, and the gates they need.

    Args:
        wanted: names as typed; empty for the default, the learned policy where gates are at hand.
        gates: "bundled", "none", a folder or a hub id; folders with heads of baselines, commas between.
        several: the default is the learned policy beside the untrained one.

    Raises:
        UserError: unknown policy (all are listed); gates needed that are not there or cannot be read.
    """
    from ..cache.policies import POLICIES, make

    for name in wanted:
        with mendable():
            make(name)
    gates, heads = _choose_heads(wanted, model_name, gates)
    missing, remark = _without_gates(model_name, gates), None
    if not wanted and missing:
        wanted, remark = (UNTRAINED,), f"{missing}: using {UNTRAINED}"
    elif not wanted:
        wanted = (LEARNED, UNTRAINED) if several else (LEARNED,)
    gated = [name for name in wanted if "log_beta" in POLICIES[name].needs]
    if gated and missing:
        raise UserError(
            f"policy {gated[0]} needs trained gates, and {missing}: name some with --gates, or choose a policy that "
            f"needs no training ({_untrained()})"
        )
    if gates in ("bundled", "none"):
        return Choice(wanted, gates if gated else None, remark, heads)
    if _is_path(gates) and not Path(gates).expanduser().exists():
        raise UserError(f"{gates}: no such gate set")
    if not gated:
        return Choice(wanted, None, f"--gates {gates} is not used: {', '.join(wanted)} decides without gates", heads)
    from .. import load_gates

    with mendable((ValueError, OSError)), quiet():
        return Choice(wanted, load_gates(os.path.expanduser(gates)), heads=heads)


def runnable(model_name: str, gates: str) -> tuple[tuple[str, ...], list[dict]]:
    """The policies that have what they need, and the others: [{"policy", "reason"}].

    Args:
        gates: as for ``choose``.
    """
    from ..cache.policies import POLICIES
    from ..gates.head_sets import bundled_heads

    rest, given = _named_heads(gates)
    names, left_out = [], []
    for name, policy in POLICIES.items():
        reason = _without_gates(model_name, rest) if "log_beta" in policy.needs else None
        if policy.head and name not in given and (gates == "none" or not _known(model_name, bundled_heads(name))):
            reason = "--gates none was given" if gates == "none" else f"no trained heads for {model_name}"
        if reason:
            left_out.append({"policy": name, "reason": reason})
        else:
            names.append(name)
    return tuple(names), left_out


def _named_heads(gates: str) -> tuple[str, dict]:
    """What --gates says of gates, and the heads that it names: kind -> HeadSet."""
    from ..gates.head_sets import META, load_heads

    given, rest = {}, []
    for name in [part.strip() for part in gates.split(",")]:
        if (Path(name).expanduser() / META).is_file():
            with mendable():
                heads = load_heads(Path(name).expanduser())
            given[heads.kind] = heads
        else:
            rest.append(name)
    return ",".join(rest) or "bundled", given


def _choose_heads(wanted: tuple[str, ...], model_name: str, gates: str) -> tuple[str, tuple]:
    """What --gates says of gates, and the heads of each baseline that has trained ones: given there, or bundled."""
    from ..cache.policies import POLICIES
    from ..gates.head_sets import bundled_heads

    rest, given = _named_heads(gates)
    for kind in (name for name in wanted if POLICIES[name].head):
        if kind not in given:
            if gates == "none" or not _known(model_name, bundled_heads(kind)):
                missing = "--gates none was given" if gates == "none" else f"none ship for {model_name}"
                raise UserError(
                    f"policy {kind} needs trained heads, and {missing}: name some with --gates FOLDER, or choose a "
                    f"policy that needs no training ({_untrained()})"
                )
            given[kind] = kind
    return rest, tuple(given[name] for name in wanted if name in given)


def _untrained() -> str:
    """The policies that work with any model as it is."""
    from ..cache.policies import POLICIES

    return ", ".join(name for name, policy in POLICIES.items() if not policy.trained)


def _without_gates(model_name: str, gates: str) -> str | None:
    """Why there are no gates, or None where there are some."""
    if gates == "none":
        return "--gates none was given"
    return f"no trained gates for {model_name} yet" if gates == "bundled" and not _bundled_for(model_name) else None


def check_budget(budget, policies: tuple[str, ...]) -> None:
    """Refuses a budget that is filled by what a policy never evicts."""
    from ..cache.policies import make

    for policy in map(make, policies):
        sinks = max(policy.sinks, budget.sinks)
        if policy.bounded and budget.tokens <= sinks + budget.recent:
            recent = f" and {budget.recent} recent tokens" if budget.recent else ""
            raise UserError(
                f"a budget of {budget.tokens} is too small: {policy.name} never evicts {sinks} sinks{recent}; "
                f"use at least {sinks + budget.recent + 1}"
            )


def pick_device(name: str) -> str:
    """The device for auto, cpu or cuda. UserError where there is no such GPU."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA GPU can be used here; leave the option out or say --device cpu")
    return name


def pick_dtype(name: str, device: str) -> str:
    """auto: what computes fastest and right on that device."""
    if name != "auto":
        return name
    return "float32" if device == "cpu" else "bfloat16"


def load_tokenizer(name: str):
    """The tokenizer of a model; the default model is fetched here at its first use."""
    place = _place(name)
    with quiet(), status(f"loading {name}"):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except Exception as error:  # a broken file raises any of a dozen types
            raise UserError(f"cannot load the tokenizer of {name!r}: {one_line(error, limit=240)}") from error


def load_model(name: str, device: str, dtype: str, gates=None, heads=()):
    """The model on its device, with gates and heads where asked for. A broken checkpoint is a UserError."""
    import torch

    place = _place(name)
    with quiet(), status(f"loading {name}"):
        from transformers import AutoModelForCausalLM

        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                place, dtype=getattr(torch, dtype), trust_remote_code=False, output_loading_info=True
            )
        except MemoryError:
            raise
        except Exception as error:  # a broken file raises any of a dozen types
            raise UserError(f"cannot load model {name!r}: {one_line(error, limit=240)}") from error
        missing = sorted(found["missing_keys"])
        if missing:  # transformers would go on with random numbers in their places
            raise UserError(f"{name}: the checkpoint lacks {len(missing)} weights, {missing[0]} among them")
        model = model.to(device).eval()
        _call(model, name)
        if gates is not None:
            from .. import attach

            with mendable():
                attach(model, gates)
        for one in heads:
            from ..gates.head_sets import attach_heads

            with mendable():
                attach_heads(model, one)
    return model


def _call(model, name: str) -> None:
    """Lets messages call the default model by its alias, and not by the cache folder that it was read from."""
    from ..embedded import ALIAS

    if name == ALIAS:
        model.config._name_or_path = ALIAS


def _check_hub(name: str) -> None:
    """Asks the hub once. transformers would ask a dozen times, for a minute, where there is no network."""
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=20)
    except errors.HFValidationError:
        raise UserError(f"{name}: neither an alias (smollm2), nor a folder, nor a Hugging Face id") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: no such folder, and no such model on the Hugging Face hub") from None
    except errors.HfHubHTTPError:
        return  # a mirror may lack this question and still have the files
    except Exception as error:  # what "no network" raises depends on proxies, resolvers and offline mode
        reason = one_line(error, limit=120)
        raise UserError(f"{name}: no such folder, and the Hugging Face hub cannot be reached ({reason})") from error


def note(text: str) -> None:
    """A remark for people: stderr, so that stdout stays what was asked for."""
    click.echo(f"trimkv: {text}", err=True)


@contextlib.contextmanager
def status(text: str):
    """A spinner on a terminal's stderr while something slow runs; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def quiet():
    """Keeps transformers' bars and its remarks about sampling flags off the screen."""
    import huggingface_hub.utils.logging
    from transformers.utils import logging

    huggingface_hub.utils.logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _place(name: str) -> str:
    from .. import embedded

    with mendable(embedded.FetchError):
        return os.path.expanduser(embedded.resolve(name))


def _is_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or "\\" in name


def _bundled_for(model_name: str) -> bool:
    """Whether gates ship for a model."""
    from ..gates import bundled

    return _known(model_name, bundled())


def _known(model_name: str, names) -> bool:
    """Whether a model is among names: a hub id and a local copy of it share the last part of their path."""

    def last(path: str) -> str:
        return path.rstrip("/").rsplit("/", 1)[-1].lower()

    return last(model_name) in map(last, names)
