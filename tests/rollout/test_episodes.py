"""Episodes: what they build out of token ids, and how they end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reasoner_ray.config import AgentConfig
from reasoner_ray.data.tasks import Item, Task
from reasoner_ray.envs.host import HostPool
from reasoner_ray.errors import ConfigError, DataError
from reasoner_ray.rollout.admissible import CandidateScorer
from reasoner_ray.rollout.engine import Sampling
from reasoner_ray.rollout.episodes import EPISODES, EpisodeContext, multi_turn, single_turn
from reasoner_ray.trajectory import ENV_VERSION, Status
from tests.rollout.fakes import ScriptedEngine

ITEM = Item(id="i1", prompt="1 + 1 =", answer="2")


class Guess:
    """Say a number; the third answer ends it."""

    def __init__(self, fail_at: int = 99) -> None:
        self.turn, self.fail_at = 0, fail_at
        self.heard: list[str] = []

    def reset(self, item: Item) -> str:
        return " begin"

    async def step(self, action: str) -> tuple[str, float, bool]:
        self.turn += 1
        self.heard.append(action)
        if self.turn == self.fail_at:
            raise OSError("the door is shut")
        return f" turn {self.turn}", 0.5, self.turn == 3


class PlayTask(Task):
    name = "play"

    def __init__(self, fail_at: int = 99) -> None:
        self.made: list[Guess] = []
        self.fail_at = fail_at

    def train(self) -> Sequence[Item]:
        return [ITEM]

    def held_out(self) -> Sequence[Item]:
        return []

    def environment(self, item: Item) -> Guess:
        self.made.append(Guess(self.fail_at))
        return self.made[-1]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def context(tokenizer: Any, engine: ScriptedEngine, task: Any, **changes: Any) -> EpisodeContext:
    values = {"max_context": 200, "max_turns": 5, "samples": 2, "sampling": Sampling(max_new_tokens=8), "group_id": "g7", **changes}
    parts: Any = {"agent": AgentConfig(), "candidates": CandidateScorer(engine), "hosts": HostPool()}  # type: ignore[arg-type]
    return EpisodeContext(engine=engine, tokenizer=tokenizer, task=task, **parts, **values)  # type: ignore[arg-type]


def test_single_turn_keeps_ids_logprobs_and_versions(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda _: ([30, 31, 1], "stop"))
    first, second = asyncio.run(single_turn(context(tokenizer, engine, PlayTask()), ITEM))
    prompt = tokenizer.encode("1 + 1 =")
    assert (first.id, second.id, first.group_id, first.task) == ("g7/0", "g7/1", "g7", "play")
    assert first.tokens.tolist() == [*prompt, 30, 31, 1]
    assert first.loss_mask.tolist() == [False] * len(prompt) + [True] * 3
    np.testing.assert_allclose(first.behaviour_logprobs[-3:], [-0.30, -0.31, -0.01])
    assert first.policy_versions.tolist() == [ENV_VERSION] * len(prompt) + [3] * 3
    assert first.status is Status.FINISHED
    assert len(engine.calls) == 1, "the group shares one prompt"
    assert engine.calls[0][2:] == (2, "g7")


def test_an_answer_cut_by_the_limit_is_truncated(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda _: ([30, 31], "length"))
    assert {t.status for t in asyncio.run(single_turn(context(tokenizer, engine, PlayTask()), ITEM))} == {Status.TRUNCATED}


def test_a_prompt_longer_than_the_context_names_its_item(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="i1.*max_context=4"):
        asyncio.run(single_turn(context(tokenizer, ScriptedEngine(lambda _: ([], "stop")), PlayTask(), max_context=4), ITEM))


def test_multi_turn_tokenises_only_new_text(tokenizer: Any) -> None:
    answers = iter([[40, 1], [41, 42, 1], [43, 1]])
    engine = ScriptedEngine(lambda _: (next(answers), "stop"))
    task = PlayTask()
    (trajectory,) = asyncio.run(multi_turn(context(tokenizer, engine, task, samples=1), ITEM))
    text = [tokenizer.encode(t, add_special_tokens=False) for t in ("1 + 1 =", " begin", " turn 1", " turn 2")]
    expected = [*text[0], *text[1], 40, 1, *text[2], 41, 42, 1, *text[3], 43, 1]
    assert trajectory.tokens.tolist() == expected
    assert [s.kind for s in trajectory.spans] == ["env", "env", "model", "env", "model", "env", "model"]
    assert [s.turn for s in trajectory.spans if s.kind == "model"] == [0, 1, 2]
    ends = [s.end - 1 for s in trajectory.spans if s.kind == "model"]
    assert trajectory.rewards[ends].tolist() == [0.5, 0.5, 0.5]
    assert trajectory.rewards.sum() == 1.5
    assert trajectory.status is Status.FINISHED
    assert task.made[0].heard == [tokenizer.decode([40]), tokenizer.decode([41, 42]), tokenizer.decode([43])]
    assert [call[0] for call in engine.calls] == [expected[: ends[0] - 1], expected[: ends[1] - 2], expected[: ends[2] - 1]]


@pytest.mark.parametrize(
    ("changes", "reason", "status"),
    [
        ({"max_turns": 2}, "stop", Status.TRUNCATED),
        ({"max_context": 14}, "stop", Status.TRUNCATED),
        ({}, "length", Status.TRUNCATED),
        ({}, "stop", Status.FINISHED),
    ],
)
def test_how_an_episode_ends(tokenizer: Any, changes: dict[str, Any], reason: str, status: Status) -> None:
    engine = ScriptedEngine(lambda _: ([40, 1], reason))
    for trajectory in asyncio.run(multi_turn(context(tokenizer, engine, PlayTask(), **changes), ITEM)):
        assert trajectory.status is status
        assert len(trajectory.tokens) <= changes.get("max_context", 200)


def test_an_exception_in_the_environment_is_a_failed_trajectory(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda _: ([40, 1], "stop"))
    group = asyncio.run(multi_turn(context(tokenizer, engine, PlayTask(fail_at=2)), ITEM))
    assert {t.status for t in group} == {Status.FAILED}
    assert group[0].info["error"] == "OSError: the door is shut"


def test_a_slow_environment_does_not_hold_up_the_loop(tokenizer: Any) -> None:
    """Its call ends only once the loop has done something else; one at a time would wait for ever."""

    class Slow(Guess):
        def __init__(self) -> None:
            super().__init__()
            self.let_go = threading.Event()

        def reset(self, item: Item) -> str:
            assert self.let_go.wait(10), "the loop was held up"
            return " begin"

    class SlowTask(PlayTask):
        def environment(self, item: Item) -> Guess:
            self.made.append(Slow())
            return self.made[-1]

    async def run() -> list[Any]:
        task = SlowTask()
        play = asyncio.ensure_future(multi_turn(context(tokenizer, ScriptedEngine(lambda _: ([40, 1], "stop")), task), ITEM))
        while len(task.made) < 2:
            await asyncio.sleep(0.001)
        for made in task.made:
            made.let_go.set()  # type: ignore[attr-defined]
        return await play

    assert {t.status for t in asyncio.run(run())} == {Status.FINISHED}


def test_an_environment_that_runs_out_is_a_failed_trajectory(tokenizer: Any) -> None:
    """StopIteration is special to threads and coroutines: it could get lost on its way."""

    class RunsOut(Guess):
        def step(self, action: str) -> tuple[str, float, bool]:  # type: ignore[override]
            return next(iter(()))

    class Task(PlayTask):
        def environment(self, item: Item) -> Guess:
            return RunsOut()

    engine = ScriptedEngine(lambda _: ([40, 1], "stop"))
    group = asyncio.run(asyncio.wait_for(multi_turn(context(tokenizer, engine, Task()), ITEM), 20))
    assert {t.info["error"] for t in group} == {"StopIteration: "}


def test_an_error_of_the_engine_is_not_the_environments(tokenizer: Any) -> None:
    def broken(_: Any) -> Any:
        raise ConnectionError("no engine")

    with pytest.raises(ConnectionError):
        asyncio.run(multi_turn(context(tokenizer, ScriptedEngine(broken), PlayTask()), ITEM))


def test_a_task_without_environment_is_refused(tokenizer: Any) -> None:
    class Plain(PlayTask):
        environment = None  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="environment"):
        asyncio.run(multi_turn(context(tokenizer, ScriptedEngine(lambda _: ([1], "stop")), Plain()), ITEM))


def test_episodes_are_found_by_name_and_by_path() -> None:
    assert EPISODES.get("single_turn") is single_turn
    assert EPISODES.get("reasoner_ray.rollout.episodes:multi_turn") is multi_turn
    with pytest.raises(ConfigError, match="single_turn"):
        EPISODES.get("singel_turn")
