"""One rollout worker: an engine, a tokenizer, a task, and many groups at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from reasoner_ray.config import JobConfig
from reasoner_ray.data.tasks import Item, get_task
from reasoner_ray.envs.host import HostPool
from reasoner_ray.labels import episode as label_episodes  # noqa: F401 - registers its episode
from reasoner_ray.labels.grading import WorkerGrader
from reasoner_ray.rollout import agents  # noqa: F401 - registers its episodes
from reasoner_ray.rollout.admissible import CandidateScorer
from reasoner_ray.rollout.engine import Engine, EngineSettings, RequestAborted, Sampling
from reasoner_ray.rollout.episodes import EPISODES, EpisodeContext, single_turn
from reasoner_ray.search import episode as search_episodes  # noqa: F401 - registers its episodes
from reasoner_ray.sync.buckets import Bucket
from reasoner_ray.trajectory import ENV_VERSION, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EngineKind = Literal["stepping", "async"]
Mode = Literal["train", "eval", "probe"]
"""Sampled and trained on; greedy; sampled and short, for the parity check."""
PROBE_TOKENS = 16
"""Tokens of a parity probe's answers."""


def build_engine(kind: EngineKind, settings: EngineSettings) -> Engine:
    """Start an engine. Raises ``ModelError`` where vLLM cannot load the model, ``EnvironmentProblem`` without vLLM."""
    from reasoner_ray.rollout.engine import require_vllm

    require_vllm()
    if kind == "stepping":
        from reasoner_ray.rollout.stepping import SteppingEngine

        return SteppingEngine(settings)
    from reasoner_ray.rollout.async_engine import AsyncEngine

    return AsyncEngine(settings)


class RolloutWorker:
    """Runs groups of episodes on one engine. Plain: no Ray; all its coroutines share one event loop."""

    def __init__(self, config: JobConfig, engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str = "engine-0") -> None:
        self.config = config
        self.engine = engine
        self.name = name
        self._tokenizer = tokenizer
        self._task = get_task(config.task, config.seed)
        self._episode = EPISODES.get(config.rollout.episode)
        # Evaluations and probes look at the bare policy; `reasoner search` is what evaluates a search.
        self._plain = single_turn if config.rollout.episode == "search" else self._episode
        self._candidates = CandidateScorer(engine, config.rollout.temperature)
        self._hosts = HostPool(config.rollout.agent.max_processes)
        self._grader = WorkerGrader(config)
        self._slots = asyncio.Semaphore(config.rollout.max_groups_per_worker)
        self._aborts = 0
        self._arrived = 0
        self._arrival = asyncio.Event()
        self._weights = asyncio.Lock()

    async def run_group(self, item: Item, group_id: str, n: int, mode: Mode = "train") -> tuple[list[Trajectory], dict[str, Any]]:
        """``n`` trajectories for ``item`` and a small summary of them (see ``summarise``).

        ``mode`` eval is greedy, unless ``trainer.eval_samples`` are asked for; probe is short. Raises ``DataError`` for an item that
        cannot be rendered, ``RequestAborted`` where the engine was told to drop its requests.
        """
        arrive, aborts = self._once_arrived(), self._aborts

        def on_request() -> None:
            arrive()
            if self._aborts != aborts:  # while the group waited for a slot or for its environment
                raise RequestAborted(f"group {group_id} was dropped")

        try:
            if mode != "train":
                return await self._run(item, group_id, n, mode, on_request)
            if self._slots.locked():
                arrive()
            async with self._slots:
                return await self._run(item, group_id, n, mode, on_request)
        finally:
            arrive()

    async def _run(
        self, item: Item, group_id: str, n: int, mode: Mode, on_request: Callable[[], None] = lambda: None
    ) -> tuple[list[Trajectory], dict[str, Any]]:
        began = time.perf_counter()
        context = EpisodeContext(
            engine=self.engine,
            tokenizer=self._tokenizer,
            task=self._task,
            sampling=self._sampling(mode),
            max_context=self.config.rollout.max_context,
            max_turns=self.config.rollout.max_turns,
            group_id=group_id,
            samples=n,
            agent=self.config.rollout.agent,
            candidates=self._candidates,
            hosts=self._hosts,
            seed=self.config.seed,
            grader=self._grader,
            config=self.config,
            on_request=on_request,
        )
        trajectories = await (self._episode if mode == "train" else self._plain)(context, item)
        return trajectories, {**summarise(group_id, trajectories), "seconds": time.perf_counter() - began, "engine": self.name}

    def _sampling(self, mode: Mode) -> Sampling:
        rollout = self.config.rollout
        stop = rollout.stop or self._task.stop
        sampling = Sampling(max_new_tokens=rollout.max_new_tokens, temperature=rollout.temperature, stop=tuple(stop))
        if mode == "eval" and not self.config.trainer.eval_samples:
            return replace(sampling, temperature=0.0)
        if mode == "probe":
            return replace(sampling, max_new_tokens=min(PROBE_TOKENS, rollout.max_new_tokens))
        return sampling

    def _once_arrived(self) -> Callable[[], None]:
        """A function that counts this group as arrived, the first time it is called."""
        counted = False

        def arrive() -> None:
            nonlocal counted
            if not counted:
                counted = True
                self._arrived += 1
                self._arrival.set()

        return arrive

    async def evaluate(self, items: Sequence[Item]) -> tuple[list[Trajectory], list[dict[str, Any]]]:
        """One greedy trajectory an item (or ``trainer.eval_samples`` sampled ones), in the order of ``items``, and their summaries."""
        samples = self.config.trainer.eval_samples or 1
        results = await asyncio.gather(*(self._run(item, f"eval-{item.id}", samples, "eval") for item in items))
        return [t for trajectories, _ in results for t in trajectories], [summary for _, summary in results]

    async def probe(self, items: Sequence[Item]) -> list[Trajectory]:
        """Short sampled trajectories of the current weights, whose log-probs the learner can check."""
        results = await asyncio.gather(*(self._run(item, f"probe-{item.id}", 1, "probe") for item in items))
        return [t for trajectories, _ in results for t in trajectories]

    async def ping(self) -> int:
        """Show that the engine works; returns its policy version."""
        await self.engine.ping()
        return self.engine.version

    async def pause(self) -> None:
        """Stop generating, keep every request."""
        await self.engine.pause()

    async def resume(self, seed: int | None = None, arrivals: int = 0) -> None:
        """Go on, once ``arrivals`` groups (counted from the worker's start) have reached the engine, wait for a slot, or ended."""
        while self._arrived < arrivals:
            self._arrival.clear()
            await self._arrival.wait()
        async with self._weights:
            await self.engine.resume(seed)

    async def update(self, buckets: AsyncIterator[Bucket], version: int) -> None:
        """Load a whole set of weights as ``version``; the engine must be paused, and is not resumed before the end of it."""
        async with self._weights:
            await self.engine.update_weights(buckets, version)

    async def abort(self) -> None:
        """Drop every request; their groups, and those yet to make their first, raise ``RequestAborted``."""
        self._aborts += 1
        await self.engine.abort()

    def close(self) -> None:
        """End the engine, its processes, those of the environments and of the graders."""
        self._hosts.close()
        self._grader.close()
        self.engine.shutdown()

    def stats(self) -> dict[str, float]:
        """Totals since the start: tokens, busy_s; and now: running, waiting, version."""
        stats = self.engine.stats
        return {
            "tokens": float(stats.new_tokens),
            "busy_s": stats.busy_seconds,
            "running": float(stats.running),
            "waiting": float(stats.waiting),
            "version": float(self.engine.version),
        }


def summarise(group_id: str, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """What the driver needs to know of a group; a list entry a trajectory.

    ``lengths`` are trainable tokens, ``rewards`` total rewards so far (scorers add theirs). ``failed`` is true where a
    trajectory cannot be trained on; ``error`` then says why.
    """
    bad = [t for t in trajectories if not t.status.is_trainable or not t.trainable_tokens]
    versions = [t.policy_versions[t.loss_mask] for t in trajectories]
    return {
        "group_id": group_id,
        "n": len(trajectories),
        "statuses": [t.status.value for t in trajectories],
        "lengths": [t.trainable_tokens for t in trajectories],
        "context_tokens": [len(t.tokens) - t.trainable_tokens for t in trajectories],
        "oldest_versions": [t.oldest_version for t in trajectories],
        "newest_versions": [int(v.max()) if len(v) else ENV_VERSION for v in versions],
        "rewards": [t.total_reward for t in trajectories],
        "failed": bool(bad),
        "error": str(bad[0].info.get("error", f"trajectory {bad[0].id}: {bad[0].status.value}")) if bad else "",
    }
