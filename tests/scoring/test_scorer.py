"""From trajectories to rewards on tokens, in the actor's body and through Ray with real kills."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reasoner_ray.config import parse_config
from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import CheckpointError, ConfigError
from reasoner_ray.scoring.base import RewardTerms, Term
from reasoner_ray.scoring.pool import ScorerPool
from reasoner_ray.scoring.scorer import Scorer, decode_answer
from reasoner_ray.trainer.parts import GroupResult
from reasoner_ray.trajectory import Status, Trajectory, TrajectoryBuilder
from tests.conftest import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
ITEM = Item(id="i", prompt="3 + 4 =", answer="7")
OBEY = Term("tests.scoring.graders_that_fail:obey", 0.5)


def trajectory(*turns: str, status: Status = Status.FINISHED, reward: float = 0.0, version: int = 3) -> Trajectory:
    """A prompt, then the policy's turns with an observation between each two; ``reward`` is given after the first turn."""
    builder = TrajectoryBuilder(id=turns[-1], group_id="g", task="t")
    builder.add_env(TOKENIZER.encode(str(ITEM.prompt)))
    for turn, text in enumerate(turns):
        if turn:
            builder.add_env(TOKENIZER.encode("go on"), turn=turn)
        ids = TOKENIZER.encode(text)
        builder.add_model(ids, [-1.0] * len(ids), [version + turn] * len(ids), turn=turn)
        if turn == 0 and reward:
            builder.add_reward(reward)
    return builder.build(status)


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    made = Scorer(RewardTerms((Term("exact_match"), OBEY)), TOKENIZER, processes=2, timeout_s=1.0)
    yield made
    made.close()


def test_the_answer_is_the_last_turn_without_special_tokens() -> None:
    assert decode_answer(trajectory("first", " second\n<|eos|>"), TOKENIZER) == " second\n"
    builder = TrajectoryBuilder(id="s", group_id="g", task="t")
    builder.add_env([5])
    ids = TOKENIZER.encode("a step and é, half a letter at a time")
    for i, token in enumerate(ids):  # the steps of one turn, cut inside a letter
        builder.add_model([token], [0.0], [0], step=i)
    assert decode_answer(builder.build(), TOKENIZER) == "a step and é, half a letter at a time"
    only_prompt = TrajectoryBuilder(id="p", group_id="g", task="t")
    only_prompt.add_env([5])
    assert decode_answer(only_prompt.build(Status.ABORTED), TOKENIZER) == ""


def test_rewards_lie_on_the_last_trainable_token(scorer: Scorer) -> None:
    group = [trajectory(" 7\n"), trajectory(" 8\n<|eos|>", version=1), trajectory("seven", status=Status.TRUNCATED)]
    rewarded, summary = scorer.score_group(group, ITEM)
    assert summary["rewards"] == [1.5, 0.5, 0.5]
    for before, after, total in zip(group, rewarded, summary["rewards"], strict=True):
        expected = np.zeros(len(after.tokens), dtype=np.float32)
        expected[np.flatnonzero(before.loss_mask)[-1]] = total
        assert np.array_equal(after.rewards, expected)
        assert np.array_equal(after.tokens, before.tokens) and after.status is before.status
    assert summary["statuses"] == ["finished", "finished", "truncated"]
    assert summary["lengths"] == [t.trainable_tokens for t in group]
    assert summary["oldest_versions"] == [3, 1, 3]
    assert summary["parts"] == {"exact_match": pytest.approx(1 / 3), OBEY.name: 1.0}
    assert not summary["failed"] and summary["unscored"] == {} and "error" not in summary
    assert (summary["samples"][0].answer, summary["samples"][0].gold, summary["samples"][0].reward) == (" 7\n", "7", 1.5)


def test_an_answer_that_cannot_be_scored_fails_and_is_never_0(scorer: Scorer) -> None:
    rewarded, summary = scorer.score_group(
        [trajectory("7"), trajectory("segfault"), trajectory("hang in python"), trajectory("exit")], ITEM
    )
    assert summary["statuses"] == ["finished", "failed", "failed", "failed"]
    assert summary["rewards"][0] == 1.5 and all(map(math.isnan, summary["rewards"][1:]))
    assert summary["unscored"] == {"GraderDied": 2, "Timeout": 1}
    assert summary["failed"] and summary["error"].startswith("item i: 3 of 4 trajectories: the grader process killed by SIGSEGV")
    assert not rewarded[1].rewards.any() and not rewarded[1].status.is_trainable
    assert rewarded[2].info["score_status"] == "timeout"


def test_what_failed_or_was_aborted_before_is_not_scored(scorer: Scorer) -> None:
    before = sum(scorer.counts.values())
    rewarded, summary = scorer.score_group([trajectory("7", status=Status.ABORTED)], ITEM)
    assert sum(scorer.counts.values()) == before
    assert rewarded[0].status is Status.ABORTED
    assert summary["failed"] and "aborted" in summary["error"]


def test_a_trajectory_in_which_the_policy_said_nothing_fails_its_group(scorer: Scorer) -> None:
    """An observation that fills the context leaves no token to learn from."""
    silent = TrajectoryBuilder(id="s", group_id="g", task="t")
    silent.add_env([5])
    _, summary = scorer.score_group([trajectory("7"), silent.build(Status.TRUNCATED)], ITEM)
    assert summary["failed"] and "1 of 2 trajectories" in summary["error"]


def test_rewards_of_an_environment_stay_where_they_were_earned() -> None:
    """Listed with a weight they are scaled; alone they are the whole reward, and no grader process is started."""
    scorer = Scorer(RewardTerms((Term("exact_match"),), environment_weight=0.5), TOKENIZER)
    (rewarded,), summary = scorer.score_group([trajectory("look", "7", reward=4.0)], ITEM)
    scorer.close()
    first, last = rewarded.spans[1].end - 1, len(rewarded.tokens) - 1
    assert (rewarded.rewards[first], rewarded.rewards[last], rewarded.rewards.sum()) == (2.0, 1.0, 3.0)
    alone = Scorer(RewardTerms(()), TOKENIZER)
    assert alone.counts == {}
    (rewarded,), summary = alone.score_group([trajectory("look", "7", reward=4.0)], ITEM)
    assert summary["rewards"] == [4.0]
    assert rewarded.rewards[first] == 4.0


@pytest.mark.slow
def test_what_keeps_a_scorer_actor_from_starting_reaches_the_driver_as_itself(ray_cluster: Any, tiny_model_dir: Path) -> None:
    scorers = [{"name": "tests.scoring.graders_that_fail:NeverBuilt", "args": {"depth": -1}}]
    pool = ScorerPool(parse_config({"model": {"path": str(tiny_model_dir)}, "scoring": {"scorers": scorers}}))

    async def start() -> None:
        try:
            await pool.start()
        finally:
            await pool.stop()

    with pytest.raises(ConfigError) as raised:
        asyncio.run(start())
    assert str(raised.value).endswith("{'depth': -1} is not taken (ValueError: depth must be positive)")
    assert "\n" not in str(raised.value), "no stack"


@pytest.mark.long
def test_scorer_actors_survive_being_killed(ray_cluster: Any, tiny_model_dir: Path) -> None:
    """Groups through two actors, one of them killed while it scores; each group comes back exactly once with its rewards."""
    import ray

    tree: dict[str, Any] = {"model": {"path": str(tiny_model_dir)}, "scoring": {"workers": 2, "scorers": [{"name": "exact_match"}]}}
    pool = ScorerPool(parse_config(tree))

    async def run() -> list[GroupResult]:
        await pool.start()
        groups = [GroupResult(trajectories=ray.put([trajectory(str(n)), trajectory("7")]), summary={"from": "rollout"}) for n in range(20)]
        calls = [asyncio.ensure_future(pool.score(g, ITEM)) for g in groups]
        for _ in range(2):
            os.kill(await pool._actors[0].ping.remote(), signal.SIGKILL)
        return await asyncio.gather(*calls)

    results = asyncio.run(run())
    assert [r.summary["rewards"] for r in results] == [[float(n == 7), 1.0] for n in range(20)]
    assert all(r.summary["from"] == "rollout" for r in results)
    scored = ray.get(results[7].trajectories)
    assert [t.total_reward for t in scored] == [1.0, 1.0]

    async def checkpoint() -> GroupResult:
        stored = await pool.store(await pool.fetch(results[7]))
        await pool.stop()
        return stored

    stored = asyncio.run(checkpoint())
    assert stored.summary == results[7].summary
    old = scored[0].spans[0]
    object.__delattr__(old, "duration")  # as unpickling leaves what was written before there was such a field
    with pytest.raises(CheckpointError, match="written by an earlier version of reasoner_ray .*duration"):
        asyncio.run(pool.store(([scored[0]], {})))
    assert [t.total_reward for t in ray.get(stored.trajectories)] == [1.0, 1.0]
