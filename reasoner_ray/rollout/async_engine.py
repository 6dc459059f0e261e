"""vLLM's AsyncLLM, with processes of its own: the engine for GPUs. It also runs on CPUs, slower than stepping.

vLLM's scheduler keeps stepping by itself, so results are not repeatable bit by bit: ``resume(seed=...)`` has no effect
on what is sampled.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from reasoner_ray import settings as process
from reasoner_ray.rollout.engine import (
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
    from vllm.v1.engine.async_llm import AsyncLLM


class AsyncEngine:
    """AsyncLLM; implements ``Engine``. Make it on the event loop that uses it. Raises ``ModelError`` where it cannot start."""

    def __init__(self, settings: EngineSettings) -> None:
        process.set_engine_environment(in_process=False)
        self._settings = settings
        self._version = 0
        self._loads = 0
        self._paused = False
        self._ids = itertools.count()
        self._free = settings.max_running
        self._room = asyncio.Condition()
        self._active: set[str] = set()
        self._new_tokens = 0
        self._waiting = 0
        self._aborts = 0
        self._busy_since: float | None = None
        self._busy_seconds = 0.0
        self._engine = _build(settings)
        self._vocabulary = self._engine.model_config.get_vocab_size()
        self._registered = False

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
        """Counters; busy is any time with a request under way."""
        now = 0.0 if self._busy_since is None else time.perf_counter() - self._busy_since
        return EngineStats(
            new_tokens=self._new_tokens,
            busy_seconds=self._busy_seconds + now,
            running=self._settings.max_running - self._free,
            waiting=self._waiting,
        )

    async def generate(self, prompt: Sequence[int], sampling: Sampling, n: int = 1, order: str = "") -> list[Generation]:
        """See ``Engine.generate``; requests start in the order they come."""
        room = check_room(prompt, self._settings.max_context, self._vocabulary)
        output = await self._submit(prompt, sampling_params(sampling, n, room), n)
        return read_completions(output)

    async def prompt_logprobs(self, tokens: Sequence[int]) -> list[float]:
        """See ``Engine.prompt_logprobs``."""
        check_room(tokens, self._settings.max_context, self._vocabulary)
        output = await self._submit(tokens, scoring_params(), 1)
        return read_prompt_logprobs(output.prompt_logprobs, tokens)

    async def next_logprobs(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
        """See ``Engine.next_logprobs``."""
        check_room(prompt, self._settings.max_context, self._vocabulary)
        return read_next_logprobs(await self._submit(prompt, next_token_params(tokens, temperature), 1), tokens)

    async def ping(self) -> None:
        """See ``Engine.ping``."""
        if self._paused:
            await self._engine.check_health()
        elif self._active:  # a request of its own would queue behind long answers
            await self._engine.get_weight_version()  # answered between two steps of the engine's process
        else:
            await self._submit([0], sampling_params(Sampling(max_new_tokens=1), 1, 1), 0)

    async def abort(self) -> None:
        """See ``Engine.abort``."""
        self._aborts += 1
        await self._engine.abort(list(self._active))
        async with self._room:
            self._room.notify_all()

    async def _submit(self, prompt: Sequence[int], params: SamplingParams, n: int) -> RequestOutput:
        """Run one request. It waits here until there is room: a request's KV cache belongs to the weights it starts under."""
        n = min(n, self._settings.max_running)
        self._waiting += 1
        aborts = self._aborts
        try:
            async with self._room:
                await self._room.wait_for(lambda: self._free >= n or self._aborts != aborts)
                if self._aborts != aborts:
                    raise RequestAborted("the engine dropped its requests")
                self._free -= n
        finally:
            self._waiting -= 1
        request_id = str(next(self._ids))
        self._begin(request_id)
        final: RequestOutput | None = None
        try:
            tokens: Any = {"prompt_token_ids": [int(t) for t in prompt], "cache_salt": f"{self._version}/{self._loads}"}
            async for output in self._engine.generate(tokens, params, request_id):
                final = output
        finally:
            self._end(request_id)
            async with self._room:
                self._free += n
                self._room.notify_all()
        if final is None:
            raise RuntimeError(f"vLLM ended request {request_id} without a result")
        self._new_tokens += sum(len(completion.token_ids) for completion in final.outputs)
        return final

    def _begin(self, request_id: str) -> None:
        if not self._active:
            self._busy_since = time.perf_counter()
        self._active.add(request_id)

    def _end(self, request_id: str) -> None:
        self._active.discard(request_id)
        if not self._active and self._busy_since is not None:
            self._busy_seconds += time.perf_counter() - self._busy_since
            self._busy_since = None

    async def pause(self) -> None:
        """See ``Engine.pause``."""
        self._paused = True
        await self._engine.pause_generation(mode="keep", clear_cache=False)

    async def resume(self, seed: int | None = None) -> None:
        """See ``Engine.resume``."""
        self._paused = False
        await self._engine.resume_generation()

    async def update_weights(self, buckets: AsyncIterator[Bucket], version: int) -> None:
        """See ``Engine.update_weights``."""
        from reasoner_ray.sync.weights import ObjectStoreUpdate

        if not self._registered:
            await self.transfer("init_weight_transfer_engine", {"init_info": {}})
            self._registered = True
        await self.transfer("start_weight_update")
        async for bucket in buckets:
            await self.transfer("update_weights", {"update_info": ObjectStoreUpdate.pack(bucket, as_bytes=True)})
        await self.transfer("finish_weight_update")
        await self.set_version(version)

    async def transfer(self, method: str, info: dict[str, Any] | None = None) -> None:
        """See ``Engine.transfer``."""
        if not self._paused:
            raise RuntimeError("weights may change only while the engine is paused")
        await self._engine.collective_rpc(method, kwargs=info or {})

    async def set_version(self, version: int) -> None:
        """See ``Engine.set_version``."""
        await self._engine.update_weight_version(str(version))
        self._version, self._loads = version, self._loads + 1

    def shutdown(self) -> None:
        """End it and its processes."""
        self._engine.shutdown()


def _build(settings: EngineSettings) -> AsyncLLM:
    import torch
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    import reasoner_ray.sync.weights  # noqa: F401 - registers the backend here; its worker extension does so in vLLM's processes

    arguments = vllm_arguments(settings, cpu=not torch.cuda.is_available())
    if "block_size" in arguments:
        arguments["block_size"] = 32  # the smallest that vLLM's own processes know on CPUs
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except (ValueError, NotImplementedError) as error:
        raise refuse(settings, error) from error
