"""Parts that sleep instead of computing: for tests of the driver's own behaviour."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reasoner_ray.errors import EnvironmentProblem, LearnerLost
from reasoner_ray.trainer.parts import GroupResult


def summary(version: int, n: int, failed: bool = False) -> dict[str, Any]:
    return {
        "rewards": [float(i % 2) for i in range(n)],
        "lengths": [4] * n,
        "oldest_versions": [version] * n,
        "statuses": ["failed" if failed else "finished"] * n,
        "unscored": {},
        "failed": failed,
        "error": "the grader died" if failed else "",
    }


@dataclass
class FakeRollouts:
    """Generates a group in ``seconds(group index)``."""

    seconds: Callable[[int], float] = lambda _: 0.0
    version: int = -1
    n_engines: int = 1
    running: asyncio.Event = field(default_factory=asyncio.Event)
    submitted: list[str] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)
    scaled: list[int] = field(default_factory=list)
    stopped: bool = False
    hangs_at: str = ""  # "start" or "evaluate", until it is cancelled

    async def start(self) -> None:
        await self._hang("start")

    async def _hang(self, where: str) -> None:
        if self.hangs_at == where:
            await asyncio.Event().wait()

    def submit(self, item: Any, group_id: str, n: int) -> Any:
        self.submitted.append(group_id)
        return group_id, n, self.version

    async def finish(self, call: Any) -> GroupResult:
        group_id, n, version = call
        await self.running.wait()
        await asyncio.sleep(self.seconds(int(group_id[1:])))
        return GroupResult(trajectories=group_id, summary=summary(version, n))

    async def evaluate(self, items: Any) -> list[GroupResult]:
        await self._hang("evaluate")
        return [GroupResult(trajectories=None, summary=summary(self.version, 1)) for _ in items]

    async def pause(self) -> None:
        self.running.clear()

    async def resume(self, seed: int | None = None) -> None:
        self.seeds.append(seed)
        self.running.set()

    async def update_weights(self, published: Any, version: int) -> None:
        assert not self.running.is_set(), "weights may change only while the engines are paused"
        self.version = version

    async def abort(self) -> None: ...

    async def scale(self, n: int) -> None:
        self.scaled.append(n)
        if n > 8:
            raise EnvironmentProblem(f"no room for {n}")
        self.n_engines = n

    async def probe(self, items: Any) -> Any:
        return self.version

    async def stats(self) -> dict[str, float]:
        return {"tokens": 1.0, "busy_s": 1.0, "restarts": 0.0}

    async def stop(self) -> None:
        self.stopped = True


@dataclass
class FakeScorers:
    """Passes groups through; ``fails(group_id)`` makes one fail, ``environment(group_id)`` tells what its environments did."""

    fails: Callable[[str], bool] = lambda _: False
    environment: Callable[[str], dict[str, int]] = lambda _: {}

    async def start(self) -> None: ...

    async def score(self, result: GroupResult, item: Any) -> GroupResult:
        if result.trajectories is not None and self.fails(result.trajectories):
            bad = {"unscored": {"grader_error": 2, "timeout": 1}, "failed": True, "error": "the grader died"}
            return GroupResult(trajectories=result.trajectories, summary={**result.summary, **bad})
        if result.trajectories is not None:
            result.summary["environment_failures"] = self.environment(result.trajectories)
            result.summary["environment_errors"] = {kind: f"the world: it {kind}" for kind in result.summary["environment_failures"]}
        return result

    async def fetch(self, result: GroupResult) -> Any:
        return result

    async def store(self, fetched: Any) -> GroupResult:
        return fetched

    async def stop(self) -> None: ...


@dataclass
class FakeLearners:
    """Its weights are the list of groups it was trained on, so that double training shows."""

    seconds: float = 0.0
    dies_at: set[int] = field(default_factory=set)
    mismatch_value: float = 0.0
    probed_tokens: list[float] = field(default_factory=list)  # of the first probes; 8 after that
    probes: int = 0
    fails_to_restart: int = 0  # times
    trained: list[str] = field(default_factory=list)
    steps: int = 0
    restarts: int = 0
    save_error: OSError | None = None
    export_error: OSError | None = None
    lost_at: list[str] = field(default_factory=list)  # methods that lose a rank, each entry once

    async def start(self) -> None: ...

    async def train_step(self, groups: Any) -> dict[str, float]:
        await asyncio.sleep(self.seconds)
        self.steps += 1
        if self.steps in self.dies_at:
            raise LearnerLost("rank 0 was killed")
        self.trained.extend(groups)
        return {"learner/tokens_per_s": 1.0}

    def _lose(self, method: str) -> None:
        if method in self.lost_at:
            self.lost_at.remove(method)
            raise LearnerLost(f"rank 0 was killed during {method}")

    async def publish_weights(self) -> Any:
        self._lose("publish_weights")
        return list(self.trained)

    async def mismatch(self, probe: Any) -> dict[str, float]:
        self.probes += 1
        tokens = self.probed_tokens.pop(0) if self.probed_tokens else 8.0
        return {"mean_abs": self.mismatch_value, "max_abs": self.mismatch_value, "k3": 0.0, "tokens": tokens}

    async def save(self, folder: Path) -> None:
        self._lose("save")
        if self.save_error is not None:
            raise self.save_error
        (folder / "trained.txt").write_text("\n".join(self.trained))

    async def load(self, folder: Path) -> None:
        self.trained = (folder / "trained.txt").read_text().split()

    async def export(self, folder: Path) -> None:
        self._lose("export")
        if self.export_error is not None:
            raise self.export_error
        folder.mkdir(parents=True, exist_ok=True)

    async def restart(self) -> None:
        self.restarts += 1
        self.trained = []
        if self.restarts <= self.fails_to_restart:
            raise LearnerLost("rank 1 was killed while it started")

    async def stop(self) -> None: ...


@dataclass
class FakeTracker:
    """Remembers what it was told."""

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    evals: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    trained: list[tuple[int, int]] = field(default_factory=list)  # (step, group)
    status: str = ""

    def start(self, total_steps: int, first_step: int) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.steps[step] = metrics

    def samples(self, step: int, rows: Any) -> None: ...

    def groups(self, step: int, rows: Any) -> None:
        self.trained.extend((step, row["group"]) for row in rows)

    def event(self, text: str, level: str = "info") -> None:
        self.events.append(text)

    def eval(self, step: int, metrics: dict[str, float]) -> None:
        self.evals.append((step, metrics))

    def rewind(self, step: int) -> None:
        self.steps = {s: m for s, m in self.steps.items() if s <= step}
        self.trained = [(s, group) for s, group in self.trained if s <= step]

    def finish(self, status: str) -> None:
        self.status = status


def long_tailed(mean: float, seed: int = 0) -> Callable[[int], float]:
    """Log-normal durations, a function of the group's index alone."""
    return lambda index: mean * random.Random(f"{seed}/{index}").lognormvariate(-0.5, 1.0)
