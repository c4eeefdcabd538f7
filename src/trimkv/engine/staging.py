"""The row in which a prompt is read, chunk by chunk, before it joins the others."""

import torch

from ..budget import Budget
from ..cache.bounded import BoundedCache, RowSnapshot
from ..cache.build import bounded_cache
from ..cache.policies import Policy
from ..hf.calls import with_cache
from ..hf.model import decoder_of
from .batch import take_apart
from .graphs import Graphs


class Staging:
    """A cache of one row whose chunks cost what they hold: a short prompt is cheap, and none looks like another.

    Args:
        target: the static cache of those that run.
    """

    def __init__(self, model, policy: Policy, budget: Budget, chunk: int, target: BoundedCache):
        self.model, self.chunk, self.target = model, chunk, target
        self.cache = self._make(policy, budget)

    @torch.no_grad()
    def _make(self, policy: Policy, budget: Budget) -> BoundedCache:
        """The cache, its memory allocated."""
        cache = bounded_cache(self.model, policy, budget, self.chunk)
        nothing = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        self.model(
            input_ids=nothing,
            position_ids=nothing,
            attention_mask=nothing,
            use_cache=True,
            **with_cache(self.model, cache),
        )
        cache.reset()
        return cache

    def prepare(self, tokens: int, more: bool) -> None:
        """Makes what reading so many tokens, the last of them with ``more``, takes; the row holds nothing of worth."""

    def clear(self) -> None:
        """Forgets what was read."""
        self.cache.reset()

    def read(self, prompt: torch.Tensor, start: int, end: int, more: bool) -> torch.Tensor | None:
        """Feeds tokens start..end-1, at most a chunk, of a prompt [P] whose first ``start`` are there. Returns the
        logits of the last, [1, V], good until something else is read.

        Args:
            more: whether the text goes on after them; nobody needs their logits then, and None is returned.
        """
        self.cache.stage_more(more)
        inputs = {
            "input_ids": prompt[None, start:end],
            "position_ids": torch.arange(start, end, device=prompt.device)[None],
            "use_cache": True,
            **with_cache(self.model, self.cache),
        }
        if more:
            decoder_of(self.model)(**inputs)
            return None
        return self.model(**inputs, logits_to_keep=1).logits[:, -1]

    def join(self, row: int) -> None:
        """Copies what was read into a row of the target."""
        self.target.copy_row(self.cache, 0, row)

    def snapshot(self) -> RowSnapshot:
        return self.cache.snapshot()

    def restore(self, snapshot: RowSnapshot) -> None:
        """Puts back what was read; to be called on a row that is cleared."""
        self.cache.restore(snapshot)

    def replay(self, idle, pool) -> None:
        """From now on what can be a graph is one: captured within ``idle``, in this pool of memory."""

    def capture(self) -> None:
        """Makes all graphs, if there are any."""

    @property
    def nbytes(self) -> int:
        """Bytes of the row."""
        return self.cache.nbytes

    def close(self) -> None:
        """Gives memory back."""
        take_apart(self.cache)
        self.cache = self.target = None


class FixedStaging(Staging):
    """A static row whose chunks are all the same work, each the replay of a graph once ``replay`` is called.

    All slots are in view from the start, and a chunk that is not whole is padded on the right: what is real, and where
    the last token stands, lies on the device. A single token is no chunk, since it evicts before it attends, so that it
    has a graph of its own. For policies that do not observe.

    Attributes:
        ids, positions, real: [1, chunk] int64, int64, bool; last, row: int64 [1]. What graphs read: tokens, which of
            them are no padding, the last of those, and the target's row.
        logits: [1, V], what the last chunk of a prompt leaves.
    """

    def __init__(self, model, policy: Policy, budget: Budget, chunk: int, target: BoundedCache):
        super().__init__(model, policy, budget, chunk, target)
        self.graphs: Graphs | None = None
        self.steps = torch.arange(chunk, device=model.device)[None]
        self.ids, self.positions = torch.zeros_like(self.steps), torch.zeros_like(self.steps)
        self.real = torch.ones_like(self.steps, dtype=torch.bool)
        self.last, self.row = (torch.zeros(1, dtype=torch.int64, device=model.device) for _ in range(2))
        self.logits: torch.Tensor | None = None

    def _make(self, policy, budget):
        cache = bounded_cache(self.model, policy, budget, self.chunk, rows=1)
        # A single token finds its slot in its own forward: nothing has to be known ahead.
        cache.ahead = None
        for layer in cache.layers:
            layer.ahead = None
        return cache

    def replay(self, idle, pool) -> None:
        """From now on all work is captured when it is first needed, and replayed. ``read`` must have run before."""
        assert self.logits is not None, "the logits of all prompts lie where those of the first one lay"
        self.graphs = Graphs(self._work, idle, pool)

    def capture(self):
        for tokens in (2 * self.chunk, self.chunk + 1):
            self.prepare(tokens, more=False)
        self.clear()
        self.join(0)

    def prepare(self, tokens, more):
        if self.graphs is None:
            return
        works = {self._forward_of((tokens - 1) % self.chunk + 1, more)}
        if tokens > self.chunk:
            works.add(self._forward_of(self.chunk, True))
        for work in sorted(works - self.graphs.captured.keys()):
            self.clear()
            self.graphs.capture(*work)

    def clear(self):
        self._run("_empty")
        for layer in self.cache.layers:
            layer.restart()

    def read(self, prompt, start, end, more):
        tokens = end - start
        self.ids[0, :tokens].copy_(prompt[start:end])  # what was there before goes on as padding
        torch.add(self.steps, start, out=self.positions).clamp_(max=end - 1)
        torch.lt(self.steps, tokens, out=self.real)
        self.last.fill_(tokens - 1)
        self._run(*self._forward_of(tokens, more))
        for layer in self.cache.layers:
            layer.columns = end
        return None if more else self.logits

    def join(self, row):
        self.target.open()
        self.row.fill_(row)
        self._run("_copy")
        self.target.took_row(self.cache)

    # The work: nothing in it reads the device, or depends on what the host knows of a prompt.

    def _run(self, *work) -> None:
        (self.graphs or self._work)(*work)

    def _work(self, name: str, *how) -> None:
        getattr(self, name)(*how)

    def _empty(self) -> None:
        self.cache.reset()
        self.cache.open()

    def _copy(self) -> None:
        self.target.take_row(self.cache, self.row)

    def _forward_of(self, tokens: int, more: bool) -> tuple:
        return "_forward", 1 if tokens == 1 else self.chunk, more

    def _forward(self, size: int, more: bool) -> None:
        self.cache.stage_more(more)
        inputs = {
            "input_ids": self.ids[:, :size],
            "position_ids": self.positions[:, :size],
            "attention_mask": self.real[:, :size],
            "use_cache": True,
            **with_cache(self.model, self.cache),
        }
        if more:
            decoder_of(self.model)(**inputs)
            return
        last = 1 if size == 1 else self.last  # which may be of another size while a graph is captured
        logits = self.model(**inputs, logits_to_keep=last).logits[:, -1]
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)

    def close(self):
        self.graphs = None
        super().close()
