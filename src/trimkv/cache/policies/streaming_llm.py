from .base import Policy


class StreamingLLM(Policy):
    """The first tokens (attention sinks) and the newest ones, at their absolute positions.

    Deviates from the official code in one point: keys keep the rotation of their true position instead of being
    re-numbered inside the cache, as in every comparison of eviction methods since.
    """

    name = "streaming_llm"
    source = "arXiv 2309.17453, section 3.2; mit-han-lab/streaming-llm@2e50426"

    def __init__(self, sinks: int = 4):
        self.sinks = sinks

    def score(self, slots, now_B11):
        return slots.position.float()
