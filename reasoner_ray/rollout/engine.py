"""The small interface to vLLM: token ids in; token ids, log-probs and policy versions out.

Two engines implement it. ``SteppingEngine`` runs vLLM inside this process and is the fast one on CPUs;
``AsyncEngine`` runs vLLM's AsyncLLM with processes of its own and is the right one on GPUs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from reasoner_ray.errors import EnvironmentProblem, ModelError
from reasoner_ray.sync.backends import MEMORY_ALONE, part_of_memory
from reasoner_ray.sync.buckets import Bucket

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput, RequestOutput

    from reasoner_ray.config import JobConfig

CPU_BLOCK_SIZE = 16
"""Tokens of a KV block on CPUs, where prompts are short: only whole blocks of a prompt are shared."""
FIRST_WEIGHTS = "default"
"""What vLLM calls the weights an engine was started with until it is told otherwise: our version 0."""
MAX_BATCHED_TOKENS = 4096
"""Tokens of one engine step on CPUs; larger batches are no faster there."""


class RequestAborted(RuntimeError):
    """The engine was told to drop its requests."""


class EngineBroken(RuntimeError):
    """vLLM failed in a step, after which nothing it holds can be relied on: the engine is of no more use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one action is sampled. Log-probs are those of this distribution, so training needs top_p=1, top_k=0, min_p=0."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy; log-probs are then those at temperature 1
    top_p: float = 1.0
    top_k: int = 0  # 0: no truncation
    min_p: float = 0.0
    stop: tuple[str, ...] = ()  # the action ends with the token that completes one of them, and keeps it


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One sampled action of L tokens, end-of-text token and stop string included."""

    tokens: list[int]  # [L]
    logprobs: list[float]  # [L], nats, of the distribution sampled from
    versions: list[int]  # [L], policy version that sampled each token
    finish_reason: Literal["stop", "length"]
    cached: int | None = None  # tokens of the prompt that the engine had computed before; None: it cannot tell (n > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Totals since the engine started, and what it is doing now."""

    new_tokens: int = 0
    busy_seconds: float = 0.0
    running: int = 0  # sequences
    waiting: int = 0  # requests


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine is built from."""

    model: Path
    dtype: str  # "float32" or "bfloat16"
    max_context: int
    seed: int = 0
    tensor_parallel: int = 1
    kv_cache_gb: float = 1.0  # CPU
    gpu_memory_utilization: float = MEMORY_ALONE  # GPU
    threads: int | None = None  # CPU threads; None: as many as the process may use cores
    trust_remote_code: bool = False
    weight_backend: str = "object_store"
    max_running: int = 256  # sequences at once

    @classmethod
    def of(cls, config: JobConfig, index: int, weight_backend: str = "object_store") -> EngineSettings:
        """The settings of the pool's engine number ``index``. Raises ``ModelError`` where the model cannot be found."""
        from reasoner_ray.models import resolve_dtype, resolve_model

        return cls(
            model=resolve_model(config.model.path),
            dtype=str(resolve_dtype(config.model.dtype)).removeprefix("torch."),
            max_context=config.rollout.max_context,
            seed=config.seed + 7919 * index,
            tensor_parallel=config.rollout.tensor_parallel,
            kv_cache_gb=config.rollout.kv_cache_gb,
            gpu_memory_utilization=config.rollout.gpu_memory_utilization or part_of_memory(config),
            threads=config.rollout.torch_threads,
            trust_remote_code=config.model.trust_remote_code,
            weight_backend=weight_backend,
        )


class Engine(Protocol):
    """One vLLM engine. All coroutines of one engine run on one event loop."""

    @property
    def version(self) -> int:
        """Policy version of the weights it holds."""
        ...

    @property
    def loads(self) -> int:
        """Times that it was given weights: a version may come twice, with other weights, where the learner went back to a checkpoint."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Counters."""
        ...

    async def generate(self, prompt: Sequence[int], sampling: Sampling, n: int = 1, order: str = "") -> list[Generation]:
        """``n`` independent actions after ``prompt``, which is computed once for all of them.

        Requests that wait when ``resume`` is called with a seed start in the order of ``order``. Raises ``ValueError``
        where the prompt leaves no room, ``RequestAborted`` where ``abort`` dropped the request, ``EngineBroken`` where vLLM failed.
        """
        ...

    async def prompt_logprobs(self, tokens: Sequence[int]) -> list[float]:
        """log p(tokens[i + 1] | tokens[: i + 1]) at temperature 1, nats, T - 1 entries."""
        ...

    async def next_logprobs(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
        """log p of each of ``tokens`` (distinct ids) as the one after ``prompt``, nats, at ``temperature``.

        Only the last position is computed where the cache holds the prompt. Raises ``ValueError`` where the prompt leaves
        no room, ``RequestAborted`` where ``abort`` dropped the request.
        """
        ...

    async def ping(self) -> None:
        """Return once the engine has shown that it works: it made a step, or sampled one token."""
        ...

    async def abort(self) -> None:
        """Drop every request."""
        ...

    async def pause(self) -> None:
        """Stop generating and keep every request."""
        ...

    async def resume(self, seed: int | None = None) -> None:
        """Go on. ``seed`` makes what follows repeatable where the engine can (see ``SteppingEngine``)."""
        ...

    async def update_weights(self, buckets: AsyncIterator[Bucket], version: int) -> None:
        """Load a whole set of weights as ``version``. The engine must be paused."""
        ...

    async def transfer(self, method: str, info: dict[str, Any] | None = None) -> None:
        """One call of vLLM's weight-transfer protocol, for backends whose trainer side drives it (nccl, ipc)."""
        ...

    async def set_version(self, version: int) -> None:
        """Label the weights it was just given; new prompts then share no KV with those before."""
        ...

    def shutdown(self) -> None:
        """End it."""
        ...


def vllm_arguments(settings: EngineSettings, *, cpu: bool) -> dict[str, Any]:
    """Engine arguments both engines share."""
    from vllm.config import WeightTransferConfig

    arguments: dict[str, Any] = {
        "model": str(settings.model),
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max_model_len": settings.max_context,
        "max_num_seqs": settings.max_running,
        "tensor_parallel_size": settings.tensor_parallel,
        "trust_remote_code": settings.trust_remote_code,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        # The distribution that is sampled from, at the sampling temperature; "raw" would be at temperature 1.
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": WeightTransferConfig(backend=settings.weight_backend),
        "worker_extension_cls": "reasoner_ray.sync.weights.WorkerExtension",
    }
    if cpu:
        arguments |= {
            "enforce_eager": True,
            "block_size": CPU_BLOCK_SIZE,
            # Given in bytes, vLLM skips its profiling run.
            "kv_cache_memory_bytes": int(settings.kv_cache_gb * 2**30),
            "max_num_batched_tokens": max(MAX_BATCHED_TOKENS, settings.max_context),
        }
    else:
        arguments |= {
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            # Ray placed this actor on its GPUs already; vLLM must not look for others.
            "distributed_executor_backend": "mp" if settings.tensor_parallel > 1 else "uni",
        }
    return arguments


def refuse(settings: EngineSettings, error: Exception) -> ModelError:
    """The error to raise where vLLM does not take a configuration."""
    return ModelError(f"vLLM cannot run {settings.model} with rollout.max_context={settings.max_context}, {settings.dtype}: {error}")


def sampling_params(sampling: Sampling, n: int, room: int) -> SamplingParams:
    """vLLM's parameters; an action never grows beyond ``room`` tokens. No per-request seed: it can kill a CPU engine."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=n,
        max_tokens=min(sampling.max_new_tokens, room),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        stop=list(sampling.stop) or None,
        include_stop_str_in_output=True,
        # Text is made only to find stop strings in it.
        detokenize=bool(sampling.stop),
        skip_special_tokens=False,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def scoring_params() -> SamplingParams:
    """vLLM's parameters for the log-probs of a prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)


def next_token_params(tokens: Sequence[int], temperature: float) -> SamplingParams:
    """vLLM's parameters for the log-probs of given next tokens. Raises ``ValueError`` past vLLM's limit of tokens a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=temperature,
        logprob_token_ids=list(tokens),
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def check_room(prompt: Sequence[int], max_context: int, vocabulary: int) -> int:
    """Tokens left for an action. Raises ``ValueError`` where there is none, or where a token id is none of the model's."""
    room = max_context - len(prompt)
    if room < 1 or not len(prompt):
        raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room for an answer within rollout.max_context={max_context}")
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise ValueError(f"a prompt's token ids run from {min(prompt)} to {max(prompt)}; the model has {vocabulary}")
    return room


def read_completions(output: RequestOutput) -> list[Generation]:
    """The sequences of a finished request, in order. Raises ``RequestAborted`` where one was aborted."""
    # vLLM runs a sequence as a request of its own and reports the cache hits of whichever ended last.
    cached = output.num_cached_tokens if len(output.outputs) == 1 else None
    return [read_completion(completion, cached) for completion in sorted(output.outputs, key=lambda c: c.index)]


def read_completion(completion: CompletionOutput, cached: int | None = None) -> Generation:
    """A finished sequence of vLLM as a ``Generation``. Raises ``RequestAborted`` where it was aborted."""
    if completion.finish_reason not in ("stop", "length"):
        raise RequestAborted(f"a request ended with {completion.finish_reason!r}")
    tokens = list(completion.token_ids)
    spans = completion.weight_versions or ()
    versions = [0 if span.version == FIRST_WEIGHTS else int(span.version) for span in spans for _ in range(span.start, span.end)]
    logprobs: Any = completion.logprobs
    return Generation(
        tokens=tokens,
        # With logprobs=0 every position holds the sampled token alone.
        logprobs=[float(x) for x in logprobs.logprobs],
        versions=versions,
        finish_reason="stop" if completion.finish_reason == "stop" else "length",
        cached=cached,
    )


def read_prompt_logprobs(values: Any, tokens: Sequence[int]) -> list[float]:
    """Log-probs of ``tokens[1:]`` out of vLLM's flat prompt log-probs, whose positions may also list the likeliest token."""
    found = []
    for position in range(1, len(tokens)):
        span = range(values.start_indices[position], values.end_indices[position])
        found.append(next(float(values.logprobs[i]) for i in span if values.token_ids[i] == tokens[position]))
    return found


def read_next_logprobs(output: RequestOutput, tokens: Sequence[int]) -> list[float]:
    """Log-probs of ``tokens`` out of a request made with ``next_token_params``. Raises ``RequestAborted`` where it was aborted."""
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length"):
        raise RequestAborted(f"a request ended with {completion.finish_reason!r}")
    flat: Any = completion.logprobs
    found = dict(zip(flat.token_ids, flat.logprobs, strict=True))
    return [float(found[token]) for token in tokens]


def require_vllm() -> None:
    """Raise ``EnvironmentProblem`` where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise EnvironmentProblem("vLLM is not installed on this node; run `make setup`, or install clusters/requirements-{cpu,gpu}.txt")
