"""The device's side of the engine: reads prompts chunk by chunk and makes one token for every running row."""

import contextlib
import logging
from collections import OrderedDict

import torch

from ..budget import Budget
from ..cache.bounded import RowSnapshot
from ..cache.build import bounded_cache
from ..cache.compiled import compiled_parts
from ..cache.fused_layers import FusedLayers, NotRecognised, recognise
from ..cache.policies import Policy
from ..hf.calls import with_cache
from ..hf.lasting import lasting
from ..ranks import local_nbytes, ranks_of
from . import batch
from .graphs import Graphs, give_back
from .reports import Reports
from .request import KINDS, Request
from .rows import Rows
from .sampling import choose, kernels, kind_of
from .staging import FixedStaging, Staging

logger = logging.getLogger(__name__)


class Runner:
    """A model, the slots of R rows, and one more row in which a prompt is read before it joins the others.

    All memory is taken here. Methods are called by one thread at a time; none waits for the device but ``results``.

    Args:
        chunk: tokens of a prompt that one forward takes.
        prefixes: rows that may be kept for later (``keep``).
        compile: whether to compile the small parts of layers that graphs are made of, which takes a while.
        fast_start: on a GPU, graphs are captured when they are first needed and not all at the start.
        fused: decode steps with whole layers as a few launches; None: on a GPU, where the model is recognised.
        batch_invariant: every step is one of all R rows, so that sums are made in one order whoever else runs.

    Attributes:
        fixed_chunks: whether every chunk of a prompt is the same work (``FixedStaging``), unless the policy observes.
            None: on a GPU, where that work is a graph; on a CPU a short prompt would cost what a long one costs.

    Raises:
        ValueError: ``fused`` for a model that is not recognised.
    """

    fixed_chunks: bool | None = None

    @lasting
    def __init__(
        self,
        model,
        policy: Policy,
        budget: Budget,
        rows: int,
        chunk: int,
        prefixes: int = 0,
        compile: bool = False,
        fast_start: bool = False,
        fused: bool | None = None,
        batch_invariant: bool = False,
    ):
        self.batch_invariant = batch_invariant
        self.model, self.num_rows, self.chunk, self.prefixes = model, rows, chunk, prefixes
        self.ranks = ranks_of(model)
        self.device, self.on_gpu = model.device, model.device.type == "cuda"
        self.lag = int(self.on_gpu)  # steps whose results are not waited for
        self.few_sizes = self.on_gpu  # a size is a graph there; on a CPU every row costs
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.compile = compile
        self.choose_and_advance = kernels(self.device) if self.ranks is None else None
        self.reports = Reports(rows, self.device)
        self.kept: OrderedDict[tuple[int, ...], RowSnapshot] = OrderedDict()
        self.prompt = torch.empty(0, dtype=torch.int64)  # what is in the staging row, or will be
        self.cache = self.staging = self.rows = self.fused = self.graphs = None
        try:
            self._take_memory(policy, budget, fast_start, fused)
        except BaseException:  # no room, say: whoever catches it may try a smaller one
            self.close()
            raise

    def _take_memory(self, policy: Policy, budget: Budget, fast_start: bool, fused: bool | None) -> None:
        model, rows, chunk = self.model, self.num_rows, self.chunk
        self.cache = bounded_cache(model, policy, budget, chunk, rows=rows)
        fixed = self.on_gpu if self.fixed_chunks is None else self.fixed_chunks
        kind = FixedStaging if fixed and not policy.observes else Staging
        self.staging = kind(model, policy, budget, chunk, self.cache)
        self.rows = Rows.empty(rows, self.vocabulary, self.device)
        self.fused = self._fused(fused)
        if self.on_gpu:
            self._warm_up()
            self._replay(torch.cuda.graph_pool_handle())
        if self.on_gpu and not fast_start:
            self._capture()

    def _fused(self, wanted: bool | None) -> FusedLayers | None:
        if wanted is False or wanted is None and not self.on_gpu:
            return None
        try:
            return recognise(self.model, self.cache.slot_layers[0].policy)
        except NotRecognised as error:
            if wanted:
                raise
            logger.info("decode steps are not fused: %s", error)
            return None

    # A prompt.

    @torch.no_grad()
    def begin(self, request: Request) -> int:
        """Makes the staging row ready for a prompt. Returns how many of its tokens are there already."""
        prompt = torch.tensor(request.prompt)
        self.prompt = (prompt.pin_memory() if self.on_gpu else prompt).to(self.device, non_blocking=True)
        key = tuple(request.prompt)
        known = [prefix for prefix in self.kept if len(prefix) < len(key) and key[: len(prefix)] == prefix]
        longest = max(known, key=len, default=())
        self.staging.prepare(len(key) - len(longest), more=request.is_prefix)
        self.staging.clear()
        if longest:
            self.kept.move_to_end(longest)
            self.staging.restore(self.kept[longest])
        return len(longest)

    @torch.no_grad()
    def read(self, start: int, end: int, more: bool) -> torch.Tensor | None:
        """Feeds tokens start..end-1 of the prompt. Returns the logits of the last, [1, V].

        Args:
            more: whether the text goes on after them; nobody needs their logits then, and None is returned.
        """
        return self.staging.read(self.prompt, start, end, more)

    @torch.no_grad()
    def join(self, request: Request, row: int, logits_1V: torch.Tensor) -> None:
        """Puts the staging row, whose prompt is read, among the running ones and draws its first token."""
        self.staging.join(row)
        self.rows.place(row, request, self.prompt)
        own = self.rows.part(row, row + 1)
        self._end(logits_1V, own, request.params.kind)
        self.reports.send(own.report, (request,))

    @torch.no_grad()
    def keep(self, request: Request) -> None:
        """Keeps the staging row for prompts that begin with this one; of too many the longest unused goes."""
        key = tuple(request.prompt)
        self.kept.pop(key, None)
        while len(self.kept) >= self.prefixes:
            self.kept.popitem(last=False)
        self.kept[key] = self.staging.snapshot()

    # The running rows.

    @torch.no_grad()
    def decode(self, requests: list[Request | None]) -> None:
        """One token for every row, of R, that has a request."""
        size = self._bucket(max(row for row, request in enumerate(requests) if request is not None) + 1)
        kind = kind_of(request.params for request in requests if request is not None)
        self.cache.refresh()
        (self.graphs or self._step)(size, kind)
        self.reports.send(self.rows.report[:size], tuple(requests[:size]))

    def _step(self, size: int, kind: str) -> None:
        """One step of the first ``size`` rows; nothing in it reads the device."""
        whole = size == self.num_rows
        rows = self.rows if whole else self.rows.part(0, size)
        cache = self.cache if whole else batch.first_rows(self.cache, size)
        with self.fused.running() if self.fused else contextlib.nullcontext():
            logits = self.model(
                input_ids=rows.token[:, None],
                position_ids=rows.position[:, None],
                attention_mask=rows.active[:, None],
                use_cache=True,
                **with_cache(self.model, cache),
            ).logits[:, -1]
        if not whole:
            batch.count_steps(self.cache, cache)
        self._end(logits, rows, kind)

    def _end(self, logits_BV: torch.Tensor, rows: Rows, kind: str) -> None:
        """Chooses the next tokens and takes them in; of several processes the first one's choice counts for all."""
        if self.choose_and_advance is not None:
            self.choose_and_advance(logits_BV, rows, kind)
            return
        token, sound = choose(logits_BV, rows, kind)
        if self.ranks is not None:
            token, sound = self.ranks.first(torch.stack([token, sound.long()]))
        rows.advance(token, sound.bool())

    def _bucket(self, rows: int) -> int:
        """Rows that a step takes for so many."""
        if self.batch_invariant:
            return self.num_rows
        return min(1 << (rows - 1).bit_length(), self.num_rows) if self.few_sizes else rows

    def results(self, all_of_them: bool):
        """(request, token, reason) of what has arrived: all, or all but what the newest step makes on a GPU."""
        return self.reports.read(leave=0 if all_of_them else self.lag)

    @torch.no_grad()
    def release(self, row: int) -> None:
        """Frees a row. What it held stays until the next request takes its place, slot by slot."""
        self.rows.active[row].fill_(False)

    def let_go(self) -> None:
        """Holds no request any more that has ended."""
        self.reports.let_go()

    @torch.no_grad()
    def reset(self) -> None:
        """After a step that broke off: every row is free and as new. Kept prefixes stay."""
        self.reports.drop()
        self.rows.active.zero_()
        self.cache.reset()
        self.cache.clear_rows(list(range(self.num_rows)))
        self.staging.clear()

    @contextlib.contextmanager
    def _idle(self):
        """Within, no row is active."""
        active = self.rows.active.clone()
        self.rows.active.zero_()
        self.cache.refresh()
        try:
            with self._compiled():
                yield
        finally:
            self.rows.active.copy_(active)

    def _compiled(self) -> contextlib.AbstractContextManager:
        """Where graphs are captured, and what they need is made beforehand."""
        return compiled_parts(self.model) if self.compile else contextlib.nullcontext()

    def _replay(self, pool) -> None:
        """From now on steps, and chunks where they can be, are graphs in one pool of memory."""
        self.graphs = Graphs(self._step, self._idle, pool)
        self.staging.replay(self._compiled, pool)

    @torch.no_grad()
    def _capture(self) -> None:
        """All graphs, the largest first: the others find room in its memory."""
        self.staging.capture()
        for size in sorted({self._bucket(n + 1) for n in range(self.num_rows)}, reverse=True):
            for kind in KINDS:
                self.graphs.capture(size, kind)

    @torch.no_grad()
    def _warm_up(self) -> None:
        """Reads a prompt that fills the slots, keeps it as often as it may be kept and makes a token: what the largest
        forwards need is then in the allocator's hands. Where all chunks are the same work, two are enough."""
        tokens = 2 * self.chunk
        if not isinstance(self.staging, FixedStaging):
            tokens += max(layer.budget.slots for layer in self.cache.slot_layers)
        self.prompt = torch.zeros(tokens, dtype=torch.int64, device=self.device)
        self.staging.clear()
        for start in range(0, tokens, self.chunk):
            self.read(start, min(start + self.chunk, tokens), more=start + self.chunk < tokens)
        taken = [self.staging.snapshot() for _ in range(self.prefixes)]
        del taken
        self.staging.join(0)
        with self._compiled():
            for kind in KINDS:
                self._step(self.num_rows, kind)
        self.reset()

    # Accounting.

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by purpose, in this process: what is allocated, and at most for prefixes and logits."""
        row = self.staging.nbytes
        logits = (self.num_rows + 1) * self.vocabulary * self.model.dtype.itemsize
        return {
            "weights": sum(local_nbytes(p) for p in (*self.model.parameters(), *self.model.buffers())),
            "slots": self.cache.nbytes,
            "staging": row,
            "prefixes": self.prefixes * row,
            "rows": self.rows.nbytes,
            "logits": logits,
        }

    def close(self) -> None:
        """Gives memory back; the model stays usable."""
        self.graphs = self.fused = self.choose_and_advance = None
        self.reports.close()
        self.kept.clear()
        if self.staging is not None:
            self.staging.close()
        if self.cache is not None:
            batch.take_apart(self.cache)
        self.cache = self.staging = self.rows = None
        self.prompt = torch.empty(0, dtype=torch.int64)
        if self.on_gpu:
            give_back()
