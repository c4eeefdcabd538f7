import torch

from .base import Policy, Published

POSITIONS = ("absolute", "cache")


class StreamingLLM(Policy):
    """The first tokens (attention sinks) and the newest ones.

    Args:
        sinks: first tokens that always stay.
        positions: "absolute" keeps the rotation of true positions, as comparisons of eviction methods do; "cache"
            counts positions within the cache, as the official code does: the sinks follow right before the window.
    """

    name = "streaming_llm"
    published = Published(name="streaming_llm_cache")
    source = "arXiv 2309.17453, section 3.2; mit-han-lab/streaming-llm@2e50426"
    formula = "position"
    search = "position"
    deviations = "Keys keep the rotation of their true position (streaming_llm_cache does as the official code)."

    def __init__(self, sinks: int = 4, positions: str = "absolute"):
        if positions not in POSITIONS:
            raise ValueError(
                f"policy streaming_llm: positions must be one of {', '.join(POSITIONS)}, got {positions!r}"
            )
        self.sinks, self.positions = sinks, positions
        if positions == "cache":
            self.moves_keys, self.needs, self.search = True, frozenset({"rotation"}), ""
            self.name, self.deviations = StreamingLLMCache.name, StreamingLLMCache.deviations

    def score(self, slots, now_B11):
        return slots.position.float()

    def keys(self, slots):
        """Only distances matter to rotated keys, and the window's own are the same in cache and text. So it is the
        sinks that move: forward by the number of tokens that are missing between them and the window."""
        valid, position = slots.valid, slots.position
        missing = position.amax(-1, keepdim=True) + 1 - valid.sum(-1, keepdim=True)
        oldest = position.where(valid, torch.iinfo(position.dtype).max)
        sink, slot = oldest.topk(min(slots.layer.sinks, position.shape[2]), largest=False)
        index = slot[..., None].expand(*slot.shape, slots.k.shape[-1])
        by = torch.where(sink < slots.layer.sinks, missing, 0)
        return slots.k.scatter(2, index, slots.layer.rotation.turn(slots.k.gather(2, index), by))


class StreamingLLMCache(StreamingLLM):
    """StreamingLLM as its official code has it: positions are counted within the cache, so that no distance exceeds
    the budget."""

    name = "streaming_llm_cache"
    published = Published()
    needs = frozenset({"rotation"})
    moves_keys = True
    search = ""
    deviations = "Cached keys stay rotated and the sinks are turned forward, exact where the code re-rotates all keys."

    def __init__(self, sinks: int = 4):
        super().__init__(sinks, "cache")
