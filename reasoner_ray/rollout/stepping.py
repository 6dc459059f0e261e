"""vLLM inside this process, one step at a time: the engine for CPUs.

vLLM's own asynchronous engine keeps processes that compete with the compute threads; stepping it directly is up to
twice as fast on a few cores and starts sooner. Every call into vLLM runs in one thread of its own; all bookkeeping
happens on the event loop, between steps. To pause is not to step.

With ``resume(seed=...)`` on an idle engine, generation is repeatable bit by bit: requests that wait start in the order
of their ``order``, the sampler is seeded, and nothing computed before (a probe, an evaluation) is shared.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from reasoner_ray import settings as process
from reasoner_ray.rollout.engine import (
    EngineBroken,
    EngineSettings,
    EngineStats,
    Generation,
    RequestAborted,
    Sampling,
    check_room,
    next_token_params,
    read_completions,
    read_next_logprobs,
    read_prompt_logprobs,
    refuse,
    sampling_params,
    scoring_params,
    vllm_arguments,
)
from reasoner_ray.sync.buckets import Bucket

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

T = TypeVar("T")


@dataclass
class _Request:
    """A request from its arrival to its result."""

    prompt: list[int]
    params: SamplingParams
    order: str
    result: asyncio.Future[Any]  # a RequestOutput
    id: str = ""
    is_ping: bool = False

    @property
    def n(self) -> int:
        return int(self.params.n)


class SteppingEngine:
    """In-process vLLM; implements ``Engine``. Raises ``ModelError`` where vLLM cannot load the model."""

    def __init__(self, settings: EngineSettings) -> None:
        process.set_engine_environment(in_process=True)
        self._settings = settings
        self._version = 0
        self._loads = 0
        self._salt = "0/0"
        self._paused = False
        self._ids = itertools.count()
        self._seedings = itertools.count()
        self._waiting: list[_Request] = []
        self._running: dict[str, _Request] = {}
        self._dropped: list[str] = []
        self._stepper: asyncio.Task[None] | None = None
        self._broken: EngineBroken | None = None
        self._new_tokens = 0
        self._busy_seconds = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm")
        self._engine: LLMEngine = self._thread.submit(_build, settings).result()
        self._vocabulary = self._engine.model_config.get_vocab_size()

    @property
    def version(self) -> int:
        """Policy version of the weights it holds."""
        return self._version

    @property
    def loads(self) -> int:
        """See ``Engine.loads``."""
        return self._loads

    @property
    def stats(self) -> EngineStats:
        """Counters."""
        return EngineStats(
            new_tokens=self._new_tokens,
            busy_seconds=self._busy_seconds,
            running=sum(r.n for r in self._running.values()),
            waiting=len(self._waiting),
        )

    # -- requests ------------------------------------------------------------------------------------------

    async def generate(self, prompt: Sequence[int], sampling: Sampling, n: int = 1, order: str = "") -> list[Generation]:
        """See ``Engine.generate``."""
        room = check_room(prompt, self._settings.max_context, self._vocabulary)
        output = await self._submit(prompt, sampling_params(sampling, n, room), order)
        return read_completions(output)

    async def prompt_logprobs(self, tokens: Sequence[int]) -> list[float]:
        """See ``Engine.prompt_logprobs``."""
        check_room(tokens, self._settings.max_context, self._vocabulary)
        output = await self._submit(tokens, scoring_params(), "")
        return read_prompt_logprobs(output.prompt_logprobs, tokens)

    async def next_logprobs(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
        """See ``Engine.next_logprobs``."""
        check_room(prompt, self._settings.max_context, self._vocabulary)
        return read_next_logprobs(await self._submit(prompt, next_token_params(tokens, temperature), ""), tokens)

    async def ping(self) -> None:
        """See ``Engine.ping``. A busy engine gets no extra request: that would change what it samples."""
        if self._paused and self._broken is None:
            await self._call(lambda: None)
        elif self._running or self._waiting:
            before = self._busy_seconds
            while self._stepper is not None and not self._stepper.done() and self._busy_seconds == before:
                await asyncio.sleep(0.01)
        else:
            await self._submit([0], sampling_params(Sampling(max_new_tokens=1), 1, 1), "", is_ping=True)

    async def abort(self) -> None:
        """See ``Engine.abort``."""
        for request in [*self._waiting, *self._running.values()]:
            self._drop(request)
            if not request.result.done():
                request.result.set_exception(RequestAborted("the engine dropped its requests"))

    async def _submit(self, prompt: Sequence[int], params: SamplingParams, order: str, is_ping: bool = False) -> Any:
        if self._broken is not None:
            raise self._broken
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        request = _Request([int(t) for t in prompt], params, order, result, is_ping=is_ping)
        self._waiting.append(request)
        self._wake()
        try:
            return await result
        except asyncio.CancelledError:
            self._drop(request)
            raise

    def _drop(self, request: _Request) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        if self._running.pop(request.id, None) is not None:
            self._dropped.append(request.id)

    # -- stepping ------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Step as long as there is something to do."""
        idle = self._stepper is None or self._stepper.done()
        if idle and not self._paused and (self._waiting or self._running):
            self._stepper = asyncio.create_task(self._step_until_idle())
            self._stepper.add_done_callback(self._on_stepper_done)

    async def _step_until_idle(self) -> None:
        while (self._waiting or self._running) and not self._paused:
            admitted, dropped, self._dropped = self._admit(), self._dropped, []
            began = time.perf_counter()
            outputs = await self._call(partial(self._step, admitted, dropped))
            self._busy_seconds += time.perf_counter() - began
            for output in outputs:
                self._settle(output)
            # Let those whose action just ended send their next one, so that it joins the very next step.
            await asyncio.sleep(0)

    def _admit(self) -> list[_Request]:
        """Requests that start now. The others wait here, not in vLLM: a request's KV cache belongs to the weights it starts under."""
        admitted: list[_Request] = []
        room = self._settings.max_running - sum(r.n for r in self._running.values())
        while self._waiting and (self._waiting[0].n <= room or not self._running):
            request = self._waiting.pop(0)
            request.id = str(next(self._ids))
            self._running[request.id] = request
            admitted.append(request)
            room -= request.n
        return admitted

    def _step(self, admitted: list[_Request], dropped: list[str]) -> list[RequestOutput]:
        """One step of vLLM, in its own thread."""
        if dropped:
            self._engine.abort_request(dropped)
        for request in admitted:
            self._engine.add_request(request.id, {"prompt_token_ids": request.prompt, "cache_salt": self._salt}, request.params)
        outputs: list[Any] = self._engine.step() if self._engine.has_unfinished_requests() else []
        return outputs

    def _settle(self, output: RequestOutput) -> None:
        """Hand a finished request its result."""
        self._new_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        request = self._running.pop(output.request_id, None)
        if request is not None and not request.result.done():
            request.result.set_result(output)

    def _on_stepper_done(self, stepper: asyncio.Task[None]) -> None:
        """Where vLLM itself failed, everyone who waits, or comes later, must hear of it."""
        error = None if stepper.cancelled() else stepper.exception()
        if error is not None:
            self._broken = EngineBroken(f"vLLM failed in a step: {type(error).__name__}: {error}")
            self._broken.__cause__ = error
            for request in [*self._waiting, *self._running.values()]:
                if not request.result.done():
                    request.result.set_exception(self._broken)
            self._waiting.clear()
            self._running.clear()
        else:
            self._wake()

    async def _call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in vLLM's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    # -- weights -------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """See ``Engine.pause``: returns after the step under way."""
        self._paused = True
        if self._stepper is not None and not self._stepper.done():
            await asyncio.wait([self._stepper])
        for request in [r for r in self._waiting if r.is_ping]:
            self._waiting.remove(request)
            request.result.set_result(None)

    async def resume(self, seed: int | None = None) -> None:
        """See ``Engine.resume`` and the module's text."""
        if seed is not None:
            await self._call(lambda: _seed(seed))
            self._salt = f"{self._version}/{self._loads}/{next(self._seedings)}"  # a seed may come again
            self._waiting.sort(key=lambda request: request.order)
        self._paused = False
        self._wake()

    async def update_weights(self, buckets: AsyncIterator[Bucket], version: int) -> None:
        """See ``Engine.update_weights``."""
        from reasoner_ray.sync.weights import ObjectStoreUpdate

        await self.transfer("start_weight_update")
        async for bucket in buckets:
            await self.transfer("update_weights", {"update_info": ObjectStoreUpdate.pack(bucket, as_bytes=False)})
        await self.transfer("finish_weight_update")
        await self.set_version(version)

    async def transfer(self, method: str, info: dict[str, Any] | None = None) -> None:
        """See ``Engine.transfer``."""
        if not self._paused:
            raise RuntimeError("weights may change only while the engine is paused")
        await self._call(lambda: self._engine.collective_rpc(method, kwargs=info or {}))

    async def set_version(self, version: int) -> None:
        """See ``Engine.set_version``."""
        await self._call(lambda: self._engine.set_weight_version(str(version)))
        self._version, self._loads = version, self._loads + 1
        self._salt = f"{version}/{self._loads}"

    def shutdown(self) -> None:
        """End it; requests under way are lost."""
        self._thread.submit(self._engine.engine_core.shutdown).result()
        self._thread.shutdown()


def _build(settings: EngineSettings) -> LLMEngine:
    """Load the model, in the thread that will step it: OpenMP's number of threads belongs to a thread."""
    import torch

    torch.set_num_threads(settings.threads or process.usable_cores())
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    import reasoner_ray.sync.weights  # registers the backend

    cpu = not torch.cuda.is_available()
    if cpu:
        import reasoner_ray.rollout.cpu_attention  # noqa: F401 - registers the smaller blocks
    try:
        arguments = EngineArgs(**{**vllm_arguments(settings, cpu=cpu), "distributed_executor_backend": "uni", "async_scheduling": False})
        engine = LLMEngine.from_engine_args(arguments)
    except (ValueError, NotImplementedError) as error:
        raise refuse(settings, error) from error
    if settings.weight_backend == "object_store":
        engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
    engine.set_weight_version("0")
    return engine


def _seed(seed: int) -> None:
    from vllm.utils.torch_utils import set_random_seed

    set_random_seed(seed)
