"""Many requests on one model, in memory that is fixed at the start."""

import asyncio
import gc
import itertools
import logging
import os
import random
import threading
import traceback
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

import torch

from .. import embedded
from ..budget import Budget
from ..cache.build import DEFAULT_CHUNK
from ..cache.policies import Policy, make
from ..gates.attach import attach
from ..gates.files import GateSet
from ..hf.lasting import lasting
from ..hf.model import full_attention_modules
from ..ranks import ranks_of
from . import batch, checks
from .bar import Bar
from .interrupt import interruptible
from .prompts import Prompt, Prompts
from .request import MAX_STOPS, MOST_TOKENS, REASONS, Request, SamplingParams, end_tokens
from .runner import Runner
from .together import Step, Together

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that a process waits for a request that the first one has been given already


class Engine:
    """Serves requests of any length and age side by side, each in one row of a batch.

    A row is a fixed number of slots, so a request is admitted as soon as a row is free, and memory is what it was at
    the start. Every ``step`` reads one chunk of a waiting prompt and makes one token for each running request. What a
    request gets depends on nothing but itself.

    ``add`` returns a request's handle, a ``Request``; results belong to it. The engine holds a request until it has
    ended, whether or not anybody else does, and keeps nothing of it afterwards. ``result``, ``stream``, ``astream`` and
    ``cancel`` take the handle, or its ``id`` while somebody holds the handle.

    ``add``, ``cancel``, ``stream`` and ``result`` may be called from any thread. Somebody must call ``step``: those who
    wait for tokens do, unless a thread was started for it (``start``).

    ``close``, or the end of a ``with`` block, gives all memory back. Gates that the engine has put on a model stay.

    Tensor parallel, for models that do not fit one GPU: start N processes with torchrun, load the model in each with
    ``from_pretrained(..., distributed_config=DistributedConfig(tp_plan="auto"))`` (or ``tp_plan="auto"``), and run the
    same program in all: the same engine, the same requests added in the same order by one thread. Each process keeps
    the slots of its own KV heads (``memory`` is that of one process) and all get all tokens. The first process decides
    where time does: when a request is begun or cancelled, and whether Ctrl-C was pressed. A step that fails in one
    process would leave the others waiting, so there it ends the engine: let the program end, and torchrun ends the
    others.

    Args:
        model: a transformers decoder model whose layers all have full attention; or a hub id, a folder or the alias
            "smollm2", which is then loaded, on a GPU in bf16 if there is one.
        policy: a name from ``trimkv policies`` or a Policy, of those that keep a fixed number of slots.
        budget: tokens per KV head and request, or a Budget. With policy full, the longest prompt and output together.
        rows: requests that run at once; more wait in a queue, first come, first served.
        chunk: tokens of a prompt that are read between two decode steps, and that attend together before an eviction.
            Larger reads prompts faster and lets running requests wait longer.
        gates: for policies that need them, where the model has none yet.
        tokenizer: for prompts that are text, and for the text of results; comes with a model given by name.
        max_prompt_tokens: longer prompts are refused; the model's own context by default.
        prefixes: beginnings of prompts that can be kept (``prefix``), each for the memory of a row.
        compile: on a GPU, torch.compile for the small parts of the model in captured graphs: a slower start.
        fast_start: on a GPU, capture graphs when they are needed and not all at the start: the first prompts and steps
            of a kind are slow.
        fused: decode steps with whole layers as a few launches each. None: on a GPU, where the model's layers are
            recognised; the log says why not.
        batch_invariant: a request's answer is the same to the last bit whatever runs beside it in this engine. Every
            step then takes all rows, also those that are free. Otherwise a step takes as many as it needs, its sums are
            made in another order than those of a larger one, and in bf16 two tokens that are nearly as likely may
            change places.

    Raises:
        ValueError: a policy, budget or model that cannot be served in fixed memory, missing gates; the message says
            what to take instead.
    """

    def __init__(
        self,
        model,
        policy: str | Policy = "trimkv",
        budget: int | Budget = 256,
        rows: int = 8,
        chunk: int = DEFAULT_CHUNK,
        *,
        gates="bundled",
        tokenizer=None,
        max_prompt_tokens: int | None = None,
        prefixes: int = 4,
        compile: bool = False,
        fast_start: bool = False,
        fused: bool | None = None,
        batch_invariant: bool = False,
    ):
        rows, chunk = checks.whole("rows", rows, 1), checks.whole("chunk", chunk, 1)
        prefixes = checks.whole("prefixes", prefixes, 0)
        if max_prompt_tokens is not None:
            max_prompt_tokens = checks.whole("max_prompt_tokens", max_prompt_tokens, 1)
        compile, fast_start = checks.flag("compile", compile), checks.flag("fast_start", fast_start)
        fused = None if fused is None else checks.flag("fused", fused)
        batch_invariant = checks.flag("batch_invariant", batch_invariant)
        if not isinstance(policy, (str, Policy)):
            raise ValueError(f"policy must be a name or a Policy, got {checks.shown(policy)}")
        if not isinstance(gates, (str, os.PathLike, GateSet)):
            raise ValueError(f"gates must be a name, a folder or a GateSet, got {checks.shown(gates)}")
        if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
            raise ValueError(f"tokenizer must be one of transformers, got {checks.shown(tokenizer)}")
        policy, budget = make(policy), Budget.of(budget)
        self._own_model = isinstance(model, (str, os.PathLike))
        if self._own_model:
            model, tokenizer = _load(os.fspath(model), tokenizer)
        if not hasattr(model, "config") or not hasattr(model, "get_decoder"):
            raise ValueError(f"model must be a transformers decoder model or its name, got {checks.shown(model)}")
        batch.check(model, policy, budget, rows)
        if "log_beta" in policy.needs and not _has_gates(model):
            attach(model, gates)
        self.model, self.tokenizer = model.eval(), tokenizer
        context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.max_prompt_tokens = max_prompt_tokens or context or MOST_TOKENS
        self.max_tokens = None if policy.bounded else budget.tokens  # of a request, where nothing is to be evicted
        self.runner = Runner(model, policy, budget, rows, chunk, prefixes, compile, fast_start, fused, batch_invariant)
        self.memory = self.runner.memory
        logger.info("engine of %d rows: %s", rows, ", ".join(f"{k} {v:,} B" for k, v in self.memory.items()))

        self._prompts = Prompts(tokenizer, self.max_prompt_tokens, self.runner.vocabulary)
        self._ends = end_tokens(model, tokenizer)
        self._running: list[Request | None] = [None] * rows
        self._reading: Request | None = None  # the request whose prompt is in the staging row
        self._fed: int | None = None  # tokens of it that are there; None before the first chunk
        self._waiting: deque[Request] = deque()
        self._requests: weakref.WeakValueDictionary[int, Request] = weakref.WeakValueDictionary()
        self._ids = itertools.count()
        self._news = threading.Condition()  # guards requests and queue; told after every step
        self._stepping = threading.Lock()  # held by whoever uses the device
        self._listeners: dict[Callable[[], object], None] = {}
        self._thread: threading.Thread | None = None
        self._closed = self._closing = self._given_back = False
        self._told_to_stop = False  # the first process has seen Ctrl-C
        self._pressed = lambda: False  # whether this one has
        self._cancelled: list[int] = []  # to be told to all processes
        self._queued = self._known = 0  # requests of smaller numbers were added; in all processes
        ranks = ranks_of(model)
        self._together = None if ranks is None else Together(ranks)

    # Asking.

    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Queues a request. Returns its handle.

        Args:
            prompt: text; token ids; or the messages of a chat, each with "role" and "content", which the tokenizer's
                chat template renders up to where the answer begins.

        Raises:
            ValueError: an empty or too long prompt, tokens the model does not know, text without a tokenizer, messages
                that the chat template refuses, more stop tokens than a row has room for; with policy full, more tokens
                than the budget.
        """
        request = self._request(prompt, params)
        self._queue([request])
        return request

    def cancel(self, request: Request | int) -> bool:
        """Ends a request, whatever it is doing. Returns whether it was not over yet; what it has made stays.

        Args:
            request: the handle, or its id while somebody holds the handle; here and in ``result``, ``stream`` and
                ``astream``.

        Raises:
            ValueError: an id whose handle nobody holds, or a request of another engine.
        """
        request = self._find(request)
        with self._news:
            if request.done:
                return False
            self._cancel(request)
            return True

    def prefix(self, prompt: Prompt) -> int:
        """Reads the beginning of prompts to come and keeps its row: longer prompts that begin with it start there.

        Whole chunks are kept, so that a prompt is cut, and its tokens evicted, where it would be without the prefix. Of
        more than ``prefixes`` the longest unused is dropped. Returns the number of tokens kept.

        Raises:
            ValueError: as for ``add``, less than a chunk, or an engine made without room for prefixes.
            RuntimeError: it could not be read.
        """
        chunk = self.runner.chunk
        if not self.runner.prefixes:
            raise ValueError("this engine keeps no prefixes; make it with prefixes=1 or more")
        request = self._request(prompt, SamplingParams(max_new_tokens=1), is_prefix=True)
        if len(request.prompt) < chunk:
            raise ValueError(f"a prefix shorter than a chunk ({chunk} tokens) spares nothing: leave it out")
        request.prompt = request.prompt[: len(request.prompt) // chunk * chunk]
        self._queue([request], first=True)
        if self.result(request).finish_reason != "length":
            raise RuntimeError(f"the prefix was not kept: {request.error or request.finish_reason}")
        return len(request.prompt)

    # Getting.

    def result(self, request: Request | int) -> Request:
        """Waits until a request has finished, and returns it."""
        request = self._find(request)
        while not request.done:
            self._advance()
        return request

    def stream(self, request: Request | int) -> Iterator[int]:
        """Yields the tokens of a request as they come; ``result`` tells how it ended."""
        return self._stream(self._find(request))

    def _stream(self, request: Request) -> Iterator[int]:
        given = 0
        while True:
            done = request.done  # asked before the tokens: none comes after it
            while given < len(request.tokens):
                yield request.tokens[given]
                given += 1
            if done:
                return
            self._advance()

    def astream(self, request: Request | int) -> AsyncIterator[int]:
        """``stream`` for an event loop; starts the thread that steps."""
        return self._astream(self._find(request))

    async def _astream(self, request: Request) -> AsyncIterator[int]:
        given = 0
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(news.set)

        with self._news:
            self._listeners[tell] = None
        self.start()
        try:
            while True:
                news.clear()
                done = request.done
                while given < len(request.tokens):
                    yield request.tokens[given]
                    given += 1
                if done:
                    return
                await news.wait()
        finally:
            with self._news:
                self._listeners.pop(tell, None)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
    ) -> list[Request]:
        """Finished requests for a list of prompts, in their order. Ctrl-C cancels them and raises.

        Args:
            params: for all prompts, or one for each.
            progress: a bar on a terminal.

        Raises:
            ValueError: as for ``add``, before anything runs.
            KeyboardInterrupt: between two steps, so that other requests and the engine go on.
        """
        prompts = _several(prompts)
        if isinstance(params, SamplingParams) or params is None:
            params = [params] * len(prompts)
        if not isinstance(params, (list, tuple)):
            raise ValueError(f"params must be SamplingParams or a list of them, got {checks.shown(params)}")
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling parameters for {len(prompts)} prompts: give one, or one for each")
        requests = [self._request(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
        progress = progress and (self._together is None or self._together.leads)
        with interruptible() as pressed, Bar(requests, progress) as bar:
            self._told_to_stop, self._pressed = False, pressed
            try:
                self._queue(requests)
                while not bar.update():
                    self._advance()
                    if self._told_to_stop if self._together else pressed():
                        raise KeyboardInterrupt
            except BaseException:
                with self._news:
                    for request in requests:
                        self._cancel(request)
                raise
            finally:
                self._pressed = lambda: False
        return requests

    # Working.

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._waiting or self._reading or self.runner.reports.waiting or any(self._running))

    @lasting
    def step(self) -> bool:
        """Reads a chunk of a prompt, if one waits, and makes a token for every running request.

        Returns whether there is more to do. If it raises, what was running has failed and the rest goes on.
        """
        with self._stepping:
            if self._closed:
                return False
            try:
                if self._together is not None and not self._agree():
                    return False
                self._sweep()
                self._read_prompt()
                launched = any(self._running)
                if launched:
                    self.runner.decode(self._running)
                self._collect(all_of_them=not launched)
                self._sweep()
            except BaseException as error:
                if self._together is None:
                    self._abandon(error)
                else:
                    self._end("error", _said(error))
                raise
            finally:
                self._tell()
            return self.busy

    def start(self) -> None:
        """Starts a thread that steps whenever there is something to do, until ``close``."""
        with self._news:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._drive, name="trimkv-engine", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Cancels everything and gives memory back, a model that was loaded by its name too; one that was given stays
        usable. On a GPU it empties torch's cache of memory, so that others can have it."""
        if self._together is not None and self._thread is not None:
            with self._news:  # the threads of all processes stop at the same step
                self._closing = True
                self._news.notify_all()
            self._thread.join()
        with self._news:
            if self._given_back:
                return
            self._given_back = True
            self._end("cancelled")
        self._tell()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._stepping:
            self._reading, self._running = None, [None] * len(self._running)
            if self._own_model:
                self.model = self.runner.model = None
            self.runner.close()
            if self._own_model:
                gc.collect()  # hooks of a model hold it

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    # The parts of a step.

    def _agree(self) -> bool:
        """Hears what the first process puts into this step. Returns whether there is one."""
        with self._news:
            known = ((id, self._requests.get(id)) for id in self._cancelled)
            self._cancelled = [id for id, request in known if request is not None and not request.done]
            own = Step(self._queued, tuple(self._cancelled), self._pressed(), self._closing)
        step = self._together.agree(own)
        with self._news:
            if not self._news.wait_for(lambda: self._queued >= step.known, PATIENCE):
                raise RuntimeError(
                    f"request {step.known - 1} was added in the first process and not in process "
                    f"{self._together.ranks.number}: add the same requests in the same order in all of them"
                )
            self._known, self._told_to_stop = step.known, self._told_to_stop or step.interrupted
            for id in step.cancelled:
                request = self._requests.get(id)
                if request is not None:  # else it had ended, and nobody held it
                    self._finish(request, "cancelled")
            if step.closed:
                self._end("cancelled")
        return not step.closed

    def _sweep(self) -> None:
        """Frees the rows of requests that are over, and lets go of these."""
        if self._reading is not None and self._reading.done:
            self._reading = None
        for row, request in enumerate(self._running):
            if request is not None and request.done:
                self._running[row] = None
                self.runner.release(row)
        self.runner.let_go()

    def _read_prompt(self) -> None:
        """A chunk of the prompt that is being read, or of the next one if a row is free for it."""
        if self._reading is None:
            self._reading, self._fed = self._next(), None
        request = self._reading
        if request is None:
            return
        try:
            if self._fed is None:
                self._fed = request.reused_tokens = self.runner.begin(request)
            end = min(self._fed + self.runner.chunk, len(request.prompt))
            whole = end == len(request.prompt)
            logits = self.runner.read(self._fed, end, more=not whole or request.is_prefix)
            self._fed = end
            if whole:
                self._reading = None
                self._place(request, logits)
        except Exception as error:  # one prompt's: the rows of the others were not touched
            if self._together is not None:
                raise
            _log("request %d failed", error, request.id)
            self._reading = None
            with self._news:
                self._finish(request, "error", _said(error))
            self._sweep()

    def _place(self, request: Request, logits: torch.Tensor | None) -> None:
        """Gives a request whose prompt was read a row; keeps that of a prefix."""
        if request.is_prefix:
            self.runner.keep(request)
            with self._news:
                self._finish(request, "length")
            return
        row = self._running.index(None)
        self._running[row] = request
        self.runner.join(request, row, logits)
        with self._news:
            if not request.done:
                request.status = "running"

    def _next(self) -> Request | None:
        """Takes the first of the queue, if it has a row to go to."""
        with self._news:
            known = (one for one in self._waiting if self._together is None or one.id < self._known)
            request = next(known, None)
            if request is None or not (request.is_prefix or None in self._running):
                return None
            self._waiting.remove(request)
            request.begin()
            return request

    def _collect(self, all_of_them: bool) -> None:
        """Hands out what steps have made."""
        for request, token, reason in self.runner.results(all_of_them):
            with self._news:
                if request.done:
                    continue
                if token >= 0:
                    request.take(token)
                if reason:
                    error = "the model's logits are not numbers" if REASONS[reason] == "error" else None
                    self._finish(request, REASONS[reason], error)

    def _abandon(self, error: BaseException) -> None:
        """After a step that broke off in the middle, some layers may have a token that others lack."""
        with self._news:
            for request in (self._reading, *self._running):
                if request is not None:
                    self._finish(request, "error", _said(error))
        self._reading, self._running = None, [None] * len(self._running)
        self.runner.reset()

    # Helpers.

    def _advance(self) -> None:
        """Brings waiting requests forward: by a step, or by waiting for the thread that steps."""
        if self._thread is None:
            self.step()
            return
        with self._news:
            self._news.wait(timeout=0.05)

    def _drive(self) -> None:
        if self.runner.on_gpu:
            torch.cuda.set_device(self.runner.device)  # a new thread begins on the first one
        while not self._closed:
            try:
                busy = self.step()
            except Exception as error:
                if self._closed:
                    return
                _log("a step failed, and with it the requests that were running", error)
                continue
            if not busy:
                with self._news:
                    self._news.wait_for(lambda: self._closed or self._closing or self._waiting)

    def _tell(self) -> None:
        with self._news:
            self._news.notify_all()
            for tell in list(self._listeners):
                try:
                    tell()
                except Exception as error:  # its event loop is gone: that is not the others' business
                    logger.info("a listener is dropped: %s", checks.one_line(error))
                    del self._listeners[tell]

    def _request(self, prompt: Prompt, params: SamplingParams | None, is_prefix: bool = False) -> Request:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {checks.shown(params)}")
        ids = self._prompts.token_ids(prompt, is_prefix)
        if self.max_tokens and len(ids) + params.max_new_tokens > self.max_tokens:
            raise ValueError(
                f"policy full keeps every token: {len(ids):,} of the prompt and "
                f"max_new_tokens={params.max_new_tokens:,} do not fit the budget of {self.max_tokens:,}"
            )
        self._prompts.check_known("stop", params.stop)
        stops = tuple(dict.fromkeys((*params.stop, *(() if params.ignore_eos else self._ends))))
        if len(stops) > MAX_STOPS:
            raise ValueError(f"{len(stops)} stop tokens, those of the model included; at most {MAX_STOPS} are possible")
        seed = random.getrandbits(63) if params.seed is None else (params.seed + 2**63) % 2**64 - 2**63
        how = {"is_prefix": is_prefix, "engine_ref": weakref.ref(self)}
        return Request(next(self._ids), ids, params, stops, seed, self.tokenizer, **how)

    def _queue(self, requests: list[Request], first: bool = False) -> None:
        with self._news:
            if self._closed:
                raise ValueError("the engine is closed")
            for request in requests:
                self._requests[request.id] = request
                self._queued = request.id + 1
                if request.params.max_new_tokens == 0:
                    self._finish(request, "length")
                elif first:
                    self._waiting.appendleft(request)
                else:
                    self._waiting.append(request)
            self._news.notify_all()

    def _find(self, request: Request | int) -> Request:
        if isinstance(request, Request):
            if request.engine_ref() is not self:
                raise ValueError(f"request {request.id} belongs to another engine")
            return request
        id = checks.whole("a request's id", request)
        found = self._requests.get(id)
        if found is None:
            raise ValueError(f"no request {id}: never added, or over and nobody holds its handle, which add returns")
        return found

    def _cancel(self, request: Request) -> None:
        """Ends a request, or sees to it that all processes do in the same step; called with ``_news`` held."""
        if self._together is None:
            self._finish(request, "cancelled")
        elif not request.done and self._together.leads:
            self._cancelled.append(request.id)

    def _end(self, reason: str, error: str | None = None) -> None:
        """Takes nothing any more, and ends all requests."""
        with self._news:
            self._closed = True
            for request in list(self._requests.values()):
                self._finish(request, reason, error)

    def _finish(self, request: Request, reason: str, error: str | None = None) -> None:
        """Ends a request that is not over; called with ``_news`` held."""
        if request.done:
            return
        if request.status == "queued" and request in self._waiting:
            self._waiting.remove(request)
        request.finish(reason, error)
        self._news.notify_all()


def _several(prompts) -> Sequence:
    """What ``generate`` is given, if it is a list of prompts."""
    if isinstance(prompts, str):
        raise ValueError("generate takes a list of prompts, and this is one text: put it into a list")
    is_list = isinstance(prompts, Sequence) or getattr(prompts, "ndim", 0) > 1
    if not is_list or isinstance(prompts, (bytes, bytearray, memoryview)):
        raise ValueError(f"generate takes a list of prompts, got {checks.shown(prompts)}")
    if isinstance(next(iter(prompts), None), Mapping):
        raise ValueError("generate takes a list of prompts, and this is one chat: put it into a list")
    return prompts


def _log(message: str, error: Exception, *values) -> None:
    """Logs an error with its traceback as text: a log that kept the traceback itself would keep tensors."""
    logger.error(message + "\n%s", *values, "".join(traceback.format_exception(error)).rstrip())


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _has_gates(model) -> bool:
    return any(getattr(module, "retention_gate", None) is not None for module in full_attention_modules(model).values())


def _load(name: str, tokenizer):
    """A model by its name, and its tokenizer unless there is one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, on_gpu = embedded.resolve(name), torch.cuda.is_available()
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16 if on_gpu else torch.float32)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:  # no such folder or repository, or one that is no model
        raise ValueError(f"cannot load {name}: {checks.one_line(error)}") from error
    return model.to("cuda" if on_gpu else "cpu"), tokenizer
