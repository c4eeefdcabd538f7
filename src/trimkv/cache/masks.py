"""What a bounded cache reads of the masks that callers and models give: which tokens are padding, and nothing else.

Slots follow the rule of positions (attention/slots.py), so a mask that asks for anything but causal attention over all
real tokens is refused.
"""

import torch

MEND = "a bounded cache takes a 2D attention_mask (1 = token, 0 = padding)"


def real_tokens(mask: torch.Tensor | None, num_new: int, cache) -> torch.Tensor | None:
    """bool [B, T]: which of the new tokens are real, or None if all are."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(f"{MEND}, not a prepared {mask.ndim}D mask")
    real = mask[:, -num_new:].bool()
    if cache.static and (num_new == 1 or cache.padded):
        return real  # followed on the device, whatever it holds
    fresh = cache.get_seq_length() == 0
    if num_new > 1 or fresh or mask.device.type == "cpu":
        return None if bool(real.all()) else real
    # A decode step on a GPU: looking at the mask would wait for the device. One row alone is never padded from outside
    # after it has begun; in a batch, the mask is followed on the device.
    return real if real.shape[0] > 1 or cache.padded else None


def check_causal(mask, num_new: int) -> None:
    """Refuses masks that let a new token attend to a later one, as a multimodal model makes them for an image.

    On a GPU this waits for the device. It is for masks that come from around the decoder: those that a decoder makes
    are causal.

    Args:
        mask: [B, 1 or Q, T, S], bool (True = may attend) or additive; or a dictionary of such masks by kind of layer.

    Raises:
        ValueError: such a mask.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or num_new == 1:
        return
    own = mask[:, :, -num_new:, -num_new:]
    if bool((own if own.dtype == torch.bool else own == 0).triu(1).any()):
        raise ValueError(
            "this model lets tokens attend to later ones, as within an image, and slots serve causal attention alone: "
            "give it text, or use the stock cache"
        )


def check_past(mask: torch.Tensor | None, num_new: int, cache) -> None:
    """Refuses a mask that leaves out tokens which the cache holds already, or counts padding among them.

    A mask of the new tokens alone says nothing of the past. On a GPU a decode step doesn't wait for the device: what is
    wrong with its mask is said by a later step.

    Raises:
        ValueError: such a mask, or one of another length.
    """
    past = cache.get_seq_length()
    if mask is None or mask.ndim != 2 or not past or mask.shape[1] == num_new:
        return
    if mask.shape[1] != past + num_new:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {past} tokens in the cache and {num_new} new ones; give "
            f"{past + num_new}, or {num_new} for the new ones alone"
        )
    if cache.static:
        return  # rows of any age
    counted, seen = mask[:, :past].sum(-1, dtype=torch.int32), cache.seen
    if mask.device.type != "cuda" or num_new > 1:
        if not torch.equal(counted.to(seen.device), seen):
            _refuse()
        return
    cache.late_check.look()
    cache.late_check.send((counted != seen).any())


class LateCheck:
    """A truth that is on its way from the device while steps go on: read when it has arrived."""

    def __init__(self):
        self.wrong: torch.Tensor | None = None
        self.arrived: torch.cuda.Event | None = None

    def send(self, wrong: torch.Tensor) -> None:
        """Starts copying a bool, unless one is still on its way."""
        if self.arrived is not None:
            return
        self.wrong = torch.empty((), dtype=torch.bool, pin_memory=True) if self.wrong is None else self.wrong
        self.wrong.copy_(wrong, non_blocking=True)
        self.arrived = torch.cuda.Event()
        self.arrived.record()

    def look(self) -> None:
        """Raises ValueError if what has arrived says so."""
        if self.arrived is not None and self.arrived.query():
            self.arrived = None
            if bool(self.wrong):
                _refuse()


def _refuse() -> None:
    raise ValueError(
        "attention_mask leaves out tokens that the cache holds already (or counts padding among them): a bounded cache "
        "can't hide them again; read the text without them into a new cache, or go back with snapshot() and restore()"
    )
