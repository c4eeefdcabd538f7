"""Where a published gate folder and the base weights that it names are."""

from pathlib import Path

from .. import embedded
from ..extras import install

DOWNLOAD_FROM = ("huggingface", "local", "wandb")
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def gate_folder(path: str, download_from: str, hub_options: dict) -> Path:
    """The folder with config.json and the gates, downloaded if need be.

    Args:
        path: a folder, a hub repository, or a wandb artifact.
        download_from: "huggingface" takes a folder or a repository; "local" a folder only, and uses no network; "wandb"
            an artifact.

    Raises:
        ValueError: nothing there, or it cannot be fetched.
    """
    if download_from not in DOWNLOAD_FROM:
        raise ValueError(f"download_from must be one of {', '.join(DOWNLOAD_FROM)}, got {download_from!r}")
    if download_from == "wandb":
        return _from_wandb(path)
    if Path(path).is_dir():
        return Path(path)
    if download_from == "local":
        raise ValueError(f"{path}: no such folder; download_from='huggingface' also takes a repository on the hub")
    return _from_hub(path, hub_options)


def base_of(name: str, folder: Path, network: bool = True) -> str:
    """Folder or hub id of the base weights that ``base_model`` in a gate folder's config.json or gates.json names.

    A relative folder is looked for beside the gates first, so that the two can move together. The default model's alias
    is its folder, fetched if need be.

    Raises:
        ValueError: the name is written as a folder and there is none; or the default model cannot be fetched.
    """
    for candidate in (folder / Path(name).expanduser(), Path(name)):
        if candidate.is_dir():
            return str(candidate.resolve())
    if name.startswith((".", "/", "~")):
        named_in = folder / ("config.json" if (folder / "config.json").exists() else "gates.json")
        raise ValueError(f"base_model {name}, named in {named_in}, is no folder here")
    if name == embedded.ALIAS and not network and not embedded.is_cached():
        raise ValueError(f"base model {name} is not on this machine yet; leave out download_from='local' to fetch it")
    try:
        return embedded.resolve(name)
    except embedded.FetchError as error:
        raise ValueError(str(error)) from None


def _from_hub(repo: str, options: dict) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["config.json", "trimkv_weights.pth", "gates.*"]
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted, **options))
    except HFValidationError:
        raise ValueError(f"{repo}: no such folder, and no name of a repository on the hub") from None
    except Exception as error:
        raise ValueError(f"{repo} is no folder here and could not be fetched from the hub: {reason(error)}") from error


def _from_wandb(artifact: str) -> Path:
    try:
        import wandb
    except ImportError:
        raise ValueError(f"download_from='wandb' needs the package wandb: {install('wandb')}") from None
    try:
        return Path(wandb.Api().artifact(artifact, type="model").download())
    except Exception as error:
        raise ValueError(f"{artifact} could not be fetched from wandb: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
