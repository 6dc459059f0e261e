"""Step models as Ray actors: loaded once, shared by every search and scorer of a job, batched across callers."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.exceptions import RayActorError

from reasoner_ray.actor_calls import result_of
from reasoner_ray.errors import ConfigError, EnvironmentProblem, ModelError, ReasonerError, ScorerGaveUp, ScoringError
from reasoner_ray.models import fingerprint, load_tokenizer, read_config, resolve_model
from reasoner_ray.settings import usable_cores

if TYPE_CHECKING:
    from reasoner_ray.prm.model import StepModel
    from reasoner_ray.steps import Partial

Format = Literal["auto", "reasoner", "qwen", "math_shepherd", "judge"]
MATH_SHEPHERD = "math-shepherd-mistral-7b-prm"
"""What the name of Math-Shepherd's public checkpoint ends with, on the hub (peiyi9979/...) and as a folder."""
_RESTARTS = 10  # times Ray brings back an actor that died and runs its calls again: scoring has no side effects
_STARTS = 3  # times the actors are brought up anew after that
_CALLS_AT_ONCE = 1000  # calls wait for their batch, they do not compute
_START_S = 900.0  # how long an actor may take to find room and load its model


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModelSpec:
    """What a process needs to load a step model; equal ones share their actors."""

    model: str
    policy: str  # the model whose tokens are scored
    format: Format = "auto"  # auto: a folder that was trained here, Qwen2.5-Math-PRM's, or Math-Shepherd's by its name
    question: str | None = None
    yes: str = "Yes"  # a judge's verdicts, one token each
    no: str = "No"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    tokens_per_microbatch: int = 8192
    kept_tokens: int = 16_384  # whose keys and values are remembered; 0: none, for data that comes once
    workers: int = 1
    cpus: float = 0.0
    gpus: float | None = None  # an actor; None: one where the cluster has any
    threads: int | None = None  # None: all cores it may use

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for a number of workers or tokens that cannot be, and for verdicts of a model that has none."""
        if self.format != "judge" and (self.yes, self.no) != ("Yes", "No"):
            raise ConfigError("the step model's args.yes and args.no are the verdicts of a judge; set its args.format to judge")
        for name, lowest in (("workers", 1), ("tokens_per_microbatch", 1), ("kept_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise ConfigError(f"the step model's args.{name} must be a whole number of at least {lowest} (got {value!r})")


def load_step_model(spec: StepModelSpec) -> StepModel:
    """The model that ``spec`` names, in this process. Raises ``ModelError``, ``ScoringError``."""
    from reasoner_ray.learner.heads import has_head
    from reasoner_ray.prm import formats
    from reasoner_ray.prm.model import ProcessModel

    folder, kind = resolve_model(spec.model), spec.format
    if kind == "auto":
        kind = "reasoner" if has_head(folder) else _public_format(spec.model, read_config(folder).get("architectures") or [])
    if kind == "auto":
        raise ModelError(
            f"{spec.model}: neither a folder that kind: prm or kind: value wrote nor a model of Qwen2.5-Math-PRM's format, nor "
            f"{MATH_SHEPHERD} by its name; set the scorer's args.format to math_shepherd, or to judge for a chat model that is asked"
        )
    if kind == "reasoner":
        _check_same_tokenizer(spec)
        return ProcessModel(spec.model, dtype=spec.dtype, tokens_per_microbatch=spec.tokens_per_microbatch, kept_tokens=spec.kept_tokens)
    cls: Any = {"qwen": formats.QwenModel, "math_shepherd": formats.MathShepherdModel, "judge": formats.JudgeModel}[kind]
    verdicts = {"yes": spec.yes, "no": spec.no} if kind == "judge" else {}
    model: StepModel = cls(
        spec.model, spec.policy, question=spec.question, dtype=spec.dtype, tokens_per_microbatch=spec.tokens_per_microbatch, **verdicts
    )
    return model


def _public_format(name: str, architectures: Sequence[str]) -> Format:
    """By what the model says of itself, else by its name: Math-Shepherd's says only that it is a Mistral. ``auto`` where unknown."""
    if any("ProcessRewardModel" in architecture for architecture in architectures):
        return "qwen"
    return "math_shepherd" if name.rstrip("/").lower().endswith(MATH_SHEPHERD) else "auto"


def _check_same_tokenizer(spec: StepModelSpec) -> None:
    """A model that reads the policy's tokens must know them by the same numbers."""
    own, theirs = (load_tokenizer(resolve_model(name)).get_vocab() for name in (spec.model, spec.policy))
    if own != theirs:
        raise ModelError(
            f"{spec.model} reads tokens of another tokenizer than {spec.policy} writes; train the process reward model from a model "
            "with the policy's tokenizer"
        )


class Batcher:
    """Scores for many callers at once: what comes while the model is busy makes the next batch."""

    def __init__(self, model: StepModel) -> None:
        self._model = model
        self._waiting: list[tuple[list[Partial], asyncio.Future[tuple[list[list[float]], int]]]] = []
        self._work: asyncio.Task[None] | None = None
        self.batches = 0

    async def score(self, partials: Sequence[Partial]) -> tuple[list[list[float]], int]:
        """The model's scores, and this caller's share of the tokens that were computed. Raises what the model raises of them."""
        answer: asyncio.Future[tuple[list[list[float]], int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((list(partials), answer))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._drain())
        return await answer

    async def _drain(self) -> None:
        while self._waiting:
            calls, self._waiting = self._waiting, []
            self.batches += 1
            try:
                outcome = await asyncio.to_thread(self._together, [partials for partials, _ in calls])
            except ScoringError:  # of one of them: each finds out by itself
                for partials, answer in calls:
                    await self._alone(partials, answer)
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, callers must not wait for ever
                for _, answer in calls:
                    _fail(answer, error)
                continue
            for (_, answer), result in zip(calls, outcome, strict=True):
                if not answer.done():
                    answer.set_result(result)

    async def _alone(self, partials: list[Partial], answer: asyncio.Future[tuple[list[list[float]], int]]) -> None:
        try:
            (result,) = await asyncio.to_thread(self._together, [partials])
        except Exception as error:  # noqa: BLE001 - see above
            _fail(answer, error)
        else:
            if not answer.done():
                answer.set_result(result)

    def _together(self, calls: list[list[Partial]]) -> list[tuple[list[list[float]], int]]:
        before, new = self._model.tokens, [self._model.unknown(partials) for partials in calls]
        scores = iter(self._model.score([partial for partials in calls for partial in partials]))
        computed = self._model.tokens - before
        shares = [computed * n // max(sum(new), 1) for n in new]
        shares[new.index(max(new))] += computed - sum(shares)  # so that the shares add up
        return [([next(scores) for _ in partials], share) for partials, share in zip(calls, shares, strict=True)]

    async def forget(self) -> None:
        """See ``StepModel.forget``. Of a batcher that nobody waits for."""
        await asyncio.to_thread(self._model.forget)


class StepModelActor:
    """Body of an actor."""

    def __init__(self, spec: StepModelSpec) -> None:
        """Load the model; ``problem`` tells what the user can mend where that fails."""
        import torch

        torch.set_num_threads(spec.threads or usable_cores())
        self._problem: ReasonerError | None = None
        try:
            self._batcher = Batcher(load_step_model(spec))
        except ReasonerError as error:
            self._problem = error

    async def problem(self) -> ReasonerError | None:
        """What kept the actor from starting, once it is ready."""
        return self._problem

    async def ping(self) -> int:
        """The actor's process id."""
        return os.getpid()

    async def score(self, partials: list[Partial]) -> tuple[list[list[float]], int]:
        """See ``Batcher.score``."""
        if self._problem is not None:
            raise self._problem
        return await self._batcher.score(partials)

    async def forget(self) -> None:
        """See ``StepModel.forget``."""
        if self._problem is None:
            await self._batcher.forget()


class StepModelPool:
    """The actors of a spec, from wherever in the job: whoever asks first starts them."""

    def __init__(self, spec: StepModelSpec) -> None:
        self._spec = spec
        self._actors: list[Any] = []
        self._outdated: list[Any] = []
        self._folder: Path | None = None
        self._version = ""

    def look(self) -> None:
        """Find out whether the model's folder was written anew since the actors loaded it; the next call then asks new ones.

        Called where a search or a group begins, not for each score: one tree is judged by one model, unless its actors are gone.
        """
        if self._actors and self._folder is not None and fingerprint(self._folder) != self._version:
            self._outdated += self._actors
            self._actors = []

    async def start(self) -> None:
        """Find or start the actors of the model as it is now, and wait until they are ready. Raises ``ReasonerError``."""
        outdated, self._outdated = self._outdated, []
        for actor in outdated:
            ray.kill(actor)  # first, for the new ones may need the room; whoever still asks them starts here as well
        self._folder = self._folder or resolve_model(self._spec.model)  # a hub is asked once
        version = fingerprint(self._folder)
        gpus = self._spec.gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) > 0 else 0.0
        digest = hashlib.sha256(repr((self._spec, version)).encode()).hexdigest()[:16]
        options: dict[str, Any] = {"num_cpus": self._spec.cpus, "num_gpus": gpus, "get_if_exists": True}
        options |= {"max_restarts": _RESTARTS, "max_task_retries": _RESTARTS, "max_concurrency": _CALLS_AT_ONCE}
        remote, names = ray.remote(StepModelActor), [f"step-model-{digest}-{i}" for i in range(self._spec.workers)]
        actors = [remote.options(**options, name=name).remote(self._spec) for name in names]
        try:
            problems = await asyncio.wait_for(asyncio.gather(*(result_of(actor.problem.remote()) for actor in actors)), _START_S)
        except TimeoutError as error:
            raise EnvironmentProblem(
                f"{self._spec.workers} actors for {self._spec.model} did not start within {_START_S:g} s: the cluster has no room for "
                f"{gpus:g} GPUs and {self._spec.cpus:g} CPUs each; lower the scorer's args.gpus, args.cpus or args.workers"
            ) from error
        for problem in problems:
            if problem is not None:
                raise problem
        self._actors, self._version = actors, version

    async def score(self, partials: Sequence[Partial], timeout_s: float | None = None) -> tuple[list[list[float]], int]:
        """Scores of the steps and the tokens computed for them; solutions of one prompt meet in one actor, which knows them.

        Raises ``ScoringError``, ``ScorerGaveUp`` after ``timeout_s`` of actors that are up, or what kept them from starting.
        """
        if not partials:
            return [], 0
        for attempt in range(_STARTS):
            try:
                if not self._actors:
                    await self.start()
                return await asyncio.wait_for(_spread(self._actors, partials), timeout_s)
            except TimeoutError as error:
                raise ScorerGaveUp(
                    f"the step model {self._spec.model} gave no scores within {timeout_s:g} s; is args.timeout_s too short?",
                    "Timeout",
                ) from error
            except RayActorError as error:
                self._actors = []  # its owner ended and took it along: the next one starts it again
                if attempt == _STARTS - 1:
                    raise EnvironmentProblem(
                        f"an actor of the step model {self._spec.model} kept dying; its log under the Ray session folder "
                        "says why, most often memory: lower the scorer's args.tokens_per_microbatch"
                    ) from error
                await asyncio.sleep(min(0.1 * 2**attempt, 5.0))
        raise AssertionError("the loop returns or raises")

    async def forget(self) -> None:
        """Let the actors begin anew, so that what a measurement counts does not depend on what was scored before it."""
        await asyncio.gather(*(result_of(actor.forget.remote()) for actor in self._actors))

    async def stop(self) -> None:
        """End the actors."""
        actors, self._actors, self._outdated = [*self._actors, *self._outdated], [], []
        for actor in actors:
            ray.kill(actor)


def shared_pool(spec: StepModelSpec) -> StepModelPool:
    """This process's handle on the actors of ``spec``, for the model that lies in its folder now."""
    pool = _pool_of(spec)
    pool.look()
    return pool


@lru_cache(maxsize=8)
def _pool_of(spec: StepModelSpec) -> StepModelPool:
    return StepModelPool(spec)


async def _spread(actors: Sequence[Any], partials: Sequence[Partial]) -> tuple[list[list[float]], int]:
    """``StepModelPool.score`` on these actors; the pool's own list may change meanwhile, since threads share a pool."""
    shares: dict[int, list[int]] = {}
    for i, partial in enumerate(partials):
        shares.setdefault(hash(partial.prompt) % len(actors), []).append(i)
    calls = [result_of(actors[a].score.remote([partials[i] for i in share])) for a, share in shares.items()]
    scores: list[list[float]] = [[] for _ in partials]
    tokens = 0
    for share, (values, computed) in zip(shares.values(), await asyncio.gather(*calls), strict=True):
        tokens += computed
        for i, value in zip(share, values, strict=True):
            scores[i] = value
    return scores, tokens


def _fail(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
