"""The rollout pool: N vLLM actors, requests routed to the least busy one, dead ones replaced.

The pool reports what it sees to the ``Fleet`` state machine, which says which engines may be given work. A group whose
engine dies runs again on another; a new engine gets the last published weights before it gets work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from reasoner_ray import settings
from reasoner_ray.config import JobConfig
from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import EnvironmentProblem, LearnerLost, ReasonerError
from reasoner_ray.rollout.actor import RolloutActor
from reasoner_ray.rollout.engine import EngineBroken
from reasoner_ray.rollout.room import check_cluster, check_room, engine_needs
from reasoner_ray.rollout.worker import EngineKind, Mode
from reasoner_ray.sync.backends import Backend, NativePush, engine_gpus, on_shared_gpu, resolve_backend
from reasoner_ray.trainer.fleet import Event, Fleet, State
from reasoner_ray.trainer.parts import GroupResult

log = logging.getLogger(__name__)

CONCURRENCY = 4096
"""Calls an actor may have open at once: a group each, most of them waiting for tokens."""


@dataclass
class _Engine:
    """An actor of the pool."""

    name: str
    index: int
    actor: Any
    process: int = 0  # 0: none, or dead
    in_flight: int = 0
    submitted: int = 0  # groups ever sent to this actor
    tokens: float = 0.0  # totals at the last call of ``stats``
    busy_s: float = 0.0


@dataclass
class Call:
    """A group on its way."""

    item: Item
    group_id: str
    n: int
    mode: Mode = "train"
    engine: _Engine | None = None
    refs: Any = field(default=None, repr=False)  # (trajectories, summary)


class RolloutPool:
    """Implements ``trainer.parts.Rollouts``. Needs an initialised Ray; used from one event loop."""

    def __init__(self, config: JobConfig, shared_gpus: Any = None) -> None:
        """``shared_gpus`` is a placement group whose bundle i holds learner rank i and engine i (``sync.backend: ipc``)."""
        self.config = config
        self._shared_gpus = shared_gpus
        self.fleet = Fleet(config.rollout.restart_limit)
        self._engines: dict[str, _Engine] = {}
        self._next_index = 0
        self._paused = False
        self._backend: Backend = "object_store"
        self._published: Any = None
        self._version = 0
        self._loading = asyncio.Lock()  # held from the pause of an engine that gets weights to its resumption
        self._changed = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()
        self._failure: BaseException | None = None
        self._carried = {"tokens": 0.0, "busy_s": 0.0}  # of engines that are gone

    @property
    def n_engines(self) -> int:
        """Engines that may be given work."""
        return len(self.fleet.routable)

    @property
    def processes(self) -> dict[str, int]:
        """Process id of every live engine's actor."""
        return {e.name: e.process for e in self._engines.values() if self._is(e, State.HEALTHY, State.SUSPECT, State.STALE)}

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start ``rollout.workers`` engines; raises ``EnvironmentProblem`` where the cluster has no room for them."""
        self._check_resources(self.config.rollout.workers)
        self._backend = resolve_backend(self.config, gpus=self._has_gpus)
        await asyncio.gather(*(self._start_engine(self._new_engine()) for _ in range(self.config.rollout.workers)))
        self._spawn(self._watch())

    async def stop(self) -> None:
        """End every engine."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*(self._end(engine) for engine in self._engines.values() if engine.actor is not None))
        self._engines.clear()

    async def scale(self, n: int) -> None:
        """Have ``n`` engines: end the newest ones once their groups are finished, or start others with the current weights.

        Raises ``EnvironmentProblem`` where the cluster has no room for more at the moment, where one died while it started, or
        where too many of those to end are being restarted; the others go on.
        """
        present = [name for name in self._engines if self.fleet.members[name].state is not State.RETIRED]
        leave = self.fleet.routable[1:][::-1][: max(0, len(present) - n)]
        await asyncio.gather(*(self._remove(name) for name in leave))
        if n > len(present):
            self._check_resources(n - len(present))
            if self._shared_gpus is None:
                await check_room(engine_needs(self.config, gpus=self._has_gpus), n - len(present))
            await asyncio.gather(*(self._add() for _ in range(n - len(present))))
        elif len(present) - len(leave) > n:
            raise EnvironmentProblem(f"{len(present) - len(leave)} engines are left, some being restarted; ask again when they are up")

    async def _add(self) -> None:
        engine = self._new_engine()
        try:
            await self._start_engine(engine)
        except RayActorError as error:
            raise EnvironmentProblem(f"{engine.name} died while it started: {error}") from error
        finally:
            if not engine.process:  # it never came up
                self.fleet.observe(engine.name, Event.RETIRED)
                if engine.actor is not None:
                    ray.kill(engine.actor)
                del self._engines[engine.name]
        try:
            await self._catch_up(engine)
        except RayActorError as error:  # one like any other by now
            self._on_death(engine, str(error))

    async def _remove(self, name: str) -> None:
        """Give an engine no more work, let its groups finish, end it."""
        engine = self._engines[name]
        self.fleet.observe(name, Event.RETIRED)
        while engine.in_flight:
            await self._wait_for_change()
        await self._bank(engine)
        await self._end(engine)
        del self._engines[name]

    async def restart(self, name: str) -> None:
        """Kill an engine and bring up a new one in its place; its groups run again elsewhere."""
        self._on_death(self._engines[name], "restart was asked for")
        while self.fleet.members[name].state is not State.HEALTHY:
            await self._wait_for_change()

    def _new_engine(self) -> _Engine:
        index, self._next_index = self._next_index, self._next_index + 1
        engine = _Engine(name=f"engine-{index}", index=index, actor=None)
        self._engines[engine.name] = engine
        self.fleet.join(engine.name)
        return engine

    async def _start_engine(self, engine: _Engine) -> None:
        rollout, kind = self.config.rollout, self.kind
        variables = settings.engine_environment(in_process=kind == "stepping", cpu=not self._has_gpus)
        if self._backend == "ipc":
            variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # CUDA IPC handles travel pickled, from our own learner
        if rollout.torch_threads is not None:
            variables["OMP_NUM_THREADS"] = str(rollout.torch_threads)
        engine.actor = (
            ray.remote(RolloutActor)
            .options(
                num_cpus=rollout.cpus,
                resources=dict(self.config.cluster.rollout_resources),
                max_concurrency=CONCURRENCY,
                runtime_env={"env_vars": variables},
                num_gpus=engine_gpus(self.config) if self._has_gpus else 0,
                **on_shared_gpu(self._shared_gpus, engine.index),
            )
            .remote(self.config, engine.index, engine.name, kind, self._backend)
        )
        engine.submitted = engine.in_flight = 0
        engine.tokens = engine.busy_s = 0.0
        engine.process = await _answer(engine.actor.start.remote())
        if self._paused:
            await _answer(engine.actor.pause.remote())

    async def _end(self, engine: _Engine) -> None:
        try:
            await asyncio.wait_for(engine.actor.stop.remote(), 5)
        except (RayActorError, RayTaskError, TimeoutError) as error:
            log.debug("%s did not end by itself: %s", engine.name, error)
        ray.kill(engine.actor)

    @property
    def _has_gpus(self) -> bool:
        return ray.cluster_resources().get("GPU", 0) > 0

    @property
    def kind(self) -> EngineKind:
        """Which engine the workers run."""
        chosen = self.config.rollout.engine
        if chosen == "auto":
            return "async" if self._has_gpus else "stepping"
        return chosen

    def _check_resources(self, engines: int) -> None:
        """An actor that fits nowhere would wait forever."""
        if self._shared_gpus is not None and self._next_index + engines > self.config.learner.ranks:
            raise EnvironmentProblem("sync.backend=ipc: every learner rank's GPU has had its engine; take sync.backend=nccl to add engines")
        check_cluster(engine_needs(self.config, gpus=self._has_gpus), engines)

    # -- groups --------------------------------------------------------------------------------------------

    def submit(self, item: Item, group_id: str, n: int, mode: Mode = "train") -> Call:
        """Hand a group to the least busy engine; returns a call that ``finish`` awaits."""
        call = Call(item, group_id, n, mode)
        self._dispatch(call)
        return call

    def _dispatch(self, call: Call) -> None:
        """Send a call to the healthy engine with the fewest groups in flight; without one it stays unsent."""
        candidates = [self._engines[name] for name in self.fleet.routable]
        if not candidates:
            call.engine = call.refs = None
            return
        engine = min(candidates, key=lambda e: (e.in_flight, e.index))
        engine.in_flight += 1
        engine.submitted += 1
        call.engine, call.refs = engine, engine.actor.run_group.remote(call.item, call.group_id, call.n, call.mode)

    async def finish(self, call: Call) -> GroupResult:
        """Wait for a group; where its engine dies, it runs again on another one. Raises what the episode raised."""
        while True:
            if call.engine is None:
                await self._wait_for_change()
                self._dispatch(call)
                continue
            engine, actor, (trajectories, summary) = call.engine, call.engine.actor, call.refs
            try:
                return GroupResult(trajectories=trajectories, summary=await _answer(summary))
            except RayActorError as error:
                log.warning("%s died with group %s: it runs again", engine.name, call.group_id)
                if engine.actor is actor:
                    self._on_death(engine, str(error))
                self._dispatch(call)
            finally:
                if engine.actor is actor:
                    engine.in_flight -= 1
                self._notify()

    async def evaluate(self, items: Sequence[Item]) -> list[GroupResult]:
        """Greedy answers, or ``trainer.eval_samples`` sampled ones, one group an item, in the order of ``items``."""
        samples = self.config.trainer.eval_samples or 1
        calls = [self.submit(item, f"eval-{item.id}", samples, "eval") for item in items]
        return list(await asyncio.gather(*(self.finish(call) for call in calls)))

    async def probe(self, items: Sequence[Item]) -> Any:
        """A reference to short sampled trajectories, some from every live engine."""
        found = await self._on_all("probe", list(items))
        return ray.put([trajectory for trajectories in found for trajectory in trajectories])

    async def abort(self) -> None:
        """Drop every request; their groups are not finished."""
        if isinstance(self._failure, LearnerLost):
            self._failure = None  # whoever lost the learner restarts it, and syncs
        self._published = None  # the ranks that own these weights may be gone; a new engine waits for the next sync
        await self._on_all("abort")

    # -- weights -------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Stop generating on every engine, keep every request. Raises what made the pool give an engine up."""
        if self._failure is not None:
            raise self._failure
        self._paused = True
        await self._on_all("pause")

    async def resume(self, seed: int | None = None) -> None:
        """Go on once the groups submitted so far have reached their engines; ``seed`` reseeds the samplers first."""
        self._paused = False
        async with self._loading:
            live = self._live()
            seeds = [None if seed is None else seed + 7919 * engine.index for engine in live]
            calls = [self._ask(e, e.actor.resume.remote(s, e.submitted)) for e, s in zip(live, seeds, strict=True)]
        await asyncio.gather(*calls)

    async def update_weights(self, published: Sequence[Any] | NativePush, version: int) -> None:
        """Load published weights (references to buckets, or a push) as ``version`` into every live engine, all of them paused.

        Raises ``LearnerLost`` where a push broke off; the engines it went to are then replaced and wait for the next sync.
        """
        async with self._loading:
            self._published, self._version = published, version
            await self._load(self._live())

    async def _load(self, engines: list[_Engine]) -> None:
        """Bring the last published weights to ``engines``."""
        published, version = self._published, self._version
        if isinstance(published, NativePush) and not (engines and await self._push(published, engines)):
            return
        actors = [engine.actor for engine in engines]
        if published is _AS_STARTED or isinstance(published, NativePush):
            calls = [self._ask(e, e.actor.label.remote(version)) for e in engines]
        else:
            calls = [self._ask(e, e.actor.update.remote(list(published), version)) for e in engines]
        for engine, actor, answer in zip(engines, actors, await asyncio.gather(*calls), strict=True):
            # One that died after it answered, while others had not, is on its way back without these weights.
            if answer is not _LOST and engine.actor is actor and self._is(engine, State.HEALTHY, State.SUSPECT, State.STALE):
                self.fleet.observe(engine.name, Event.SYNCED)
        self._notify()

    async def _push(self, published: NativePush, engines: list[_Engine]) -> bool:
        """Have the ranks send; engines of a push that broke off are replaced, for each may hang in it."""
        actors = [engine.actor for engine in engines]
        try:
            return await published.push(actors)
        except LearnerLost:
            self._published = None
            for engine, actor in zip(engines, actors, strict=True):
                if engine.actor is actor:
                    self._on_death(engine, "the weights sent to it broke off")
            raise

    async def assume_synced(self, version: int) -> None:
        """Let engines, and those that replace them, work with the weights they were started with, as ``version``."""
        async with self._loading:
            self._published, self._version = _AS_STARTED, version
            await self._load(self._live())

    async def _catch_up(self, engine: _Engine) -> None:
        """Bring the last published weights to an engine that joined late; where the learner's ranks would have to send
        them and have moved on, it waits for the next sync. Raises ``LearnerLost`` as ``update_weights`` does."""
        async with self._loading:
            if self._published is None:
                return
            actor = engine.actor
            await _answer(actor.pause.remote())
            await self._load([engine])
            if not self._paused:
                await self._ask(engine, actor.resume.remote(None, 0))

    # -- health --------------------------------------------------------------------------------------------

    async def stats(self) -> dict[str, float]:
        """Since the last call: tokens generated, seconds engines were busy (summed); over the run: restarts."""
        totals, self._carried = self._carried, {"tokens": 0.0, "busy_s": 0.0}
        for engine in self._live():
            now = await self._ask(engine, engine.actor.stats.remote())
            if now is not _LOST:
                totals["tokens"] += now["tokens"] - engine.tokens
                totals["busy_s"] += now["busy_s"] - engine.busy_s
                engine.tokens, engine.busy_s = now["tokens"], now["busy_s"]
        return {**totals, "restarts": float(self.fleet.restarts)}

    async def _bank(self, engine: _Engine) -> None:
        """Keep the counters of an engine that leaves."""
        now = await self._ask(engine, engine.actor.stats.remote())
        if now is not _LOST:
            self._carried["tokens"] += now["tokens"] - engine.tokens
            self._carried["busy_s"] += now["busy_s"] - engine.busy_s

    async def _watch(self) -> None:
        """Ask every engine for a sign of life, again and again."""
        seconds = self.config.rollout.probe_seconds
        while True:
            await asyncio.sleep(seconds)
            await asyncio.gather(*(self._check(engine, seconds) for engine in self._live()))

    async def _check(self, engine: _Engine, seconds: float) -> None:
        actor = engine.actor
        try:
            await asyncio.wait_for(_answer(actor.ping.remote()), seconds)
            event = Event.PROBE_ANSWERED
        except TimeoutError:
            event = Event.PROBE_MISSED
        except RayActorError as error:
            if engine.actor is actor:
                self._on_death(engine, str(error))
            return
        if engine.actor is actor and self._is(engine, State.HEALTHY, State.SUSPECT, State.STALE):
            if self.fleet.observe(engine.name, event) is State.DEAD:
                self._on_death(engine, f"no sign of life in {2 * seconds:g} s")
            self._notify()

    def _on_death(self, engine: _Engine, reason: str) -> None:
        """An engine is gone (or must go): note it and bring up another in its place."""
        state = self.fleet.members[engine.name].state
        if state in (State.RESTARTING, State.RETIRED) or not engine.process:
            return  # each of its groups reports the same death
        engine.process = 0
        log.warning("%s is dead: %s", engine.name, reason.splitlines()[0] if reason else "no reason given")
        ray.kill(engine.actor)
        if state is not State.DEAD:
            self.fleet.observe(engine.name, Event.DIED)
        self._spawn(self._replace(engine))

    async def _replace(self, engine: _Engine) -> None:
        """Restart a dead engine, as often as the fleet allows. Raises ``EnvironmentProblem`` past that."""
        while True:
            self.fleet.observe(engine.name, Event.RESTART_BEGAN)
            try:
                await self._start_engine(engine)
                self.fleet.observe(engine.name, Event.RESTARTED)
                await self._catch_up(engine)
                return
            except RayActorError as error:
                log.warning("%s died again while starting: %s", engine.name, error)
                self.fleet.observe(engine.name, Event.DIED)

    # -- plumbing ------------------------------------------------------------------------------------------

    def _is(self, engine: _Engine, *states: State) -> bool:
        return self.fleet.members[engine.name].state in states

    def _live(self) -> list[_Engine]:
        return [e for e in self._engines.values() if self._is(e, State.HEALTHY, State.SUSPECT, State.STALE) and e.process]

    async def _on_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every live engine; those that die at it are replaced and left out of the answers."""
        answers = await asyncio.gather(*(self._ask(e, getattr(e.actor, method).remote(*arguments)) for e in self._live()))
        return [a for a in answers if a is not _LOST]

    async def _ask(self, engine: _Engine, ref: Any) -> Any:
        """The answer of an engine, or ``_LOST`` where it died."""
        actor = engine.actor
        try:
            return await _answer(ref)
        except RayActorError as error:
            if engine.actor is actor:
                self._on_death(engine, str(error))
            return _LOST

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _wait_for_change(self) -> None:
        """Wait until an engine's state or load changed; raises what made the pool give up."""
        if self._failure is not None:
            raise self._failure
        await self._changed.wait()
        if self._failure is not None:
            raise self._failure

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` in the background; an error in it reaches whoever waits for the pool."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._on_background_done)

    def _on_background_done(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
        self._notify()


_LOST, _AS_STARTED = object(), object()
"""No answer, for its engine died; no weights, but those of the model's folder."""


async def _answer(ref: Any) -> Any:
    """Await a Ray reference; an error meant for the user comes back as itself, without Ray's wrapping."""
    try:
        return await ref
    except RayTaskError as error:
        if isinstance(error.cause, ReasonerError):
            raise error.cause from None
        # Either is the engine's death, though its actor lives on. (EngineDeadError is vLLM's, which is not imported here.)
        if isinstance(error.cause, EngineBroken) or type(error.cause).__name__ == "EngineDeadError":
            raise RayActorError(error_msg=f"vLLM's engine died: {error.cause}") from None
        raise
