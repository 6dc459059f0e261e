"""Process rewards on trajectories: where they lie, what they are, and that a scorer's failure is a status."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from reasoner_ray.algorithms import get_algorithm
from reasoner_ray.config import load_config, parse_config
from reasoner_ray.credit import action_streams, hierarchical_gae
from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import ConfigError, ScoringError
from reasoner_ray.prm.settings import ProcessRewardConfig
from reasoner_ray.scoring.base import RewardTerms, Term
from reasoner_ray.scoring.process_reward import ProcessReward, partial_of
from reasoner_ray.scoring.scorer import Scorer
from reasoner_ray.steps import Partial
from reasoner_ray.trainer.metrics import evaluation_metrics, step_metrics
from reasoner_ray.trainer.parts import GroupResult
from reasoner_ray.trajectory import Status, Trajectory, TrajectoryBuilder, flatten


class Table:
    """Scores by a solution's number of steps: 0.75, 0.25, 0.5 and so on, or what a test gives."""

    tokens = 0

    def __init__(self, values: Sequence[float] = (0.75, 0.25, 0.5), spare: int = 0) -> None:
        self._values, self._spare = values, spare

    async def score(self, partials: Sequence[Partial]) -> list[list[float]]:
        return [[*self._values[: len(p.ends)], *[0.5] * self._spare] for p in partials]


class Broken(Table):
    async def score(self, partials: Sequence[Partial]) -> list[list[float]]:
        raise ScoringError("the actor is gone")


class Foreign(Table):
    async def score(self, partials: Sequence[Partial]) -> list[list[float]]:
        raise KeyError("someone else's mistake")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def answer(tokenizer: Any, text: str, status: Status = Status.FINISHED) -> Trajectory:
    builder = TrajectoryBuilder(id=text, group_id="g", task="test")
    builder.add_env(tokenizer.encode("1 + 2 ="))
    tokens = tokenizer.encode(text)
    builder.add_model(tokens, [-1.0] * len(tokens), [0] * len(tokens))
    return builder.build(status)


def process(scorer: Any, tokenizer: Any, **settings: Any) -> ProcessReward:
    return ProcessReward(ProcessRewardConfig(**{"separator": "\n", "transform": "raw", **settings}), lambda: scorer, tokenizer)


BY_HAND = {
    "raw": [0.75, 0.25, 0.5],
    "difference": [0.75, -0.5, 0.25],
    "shaping": [0.75, -0.5, -0.25],
    "minimum": [0.75, -0.5, 0.0],
}


@pytest.mark.parametrize("transform", BY_HAND)
def test_rewards_lie_on_the_last_token_of_each_step(transform: str, tokenizer: Any) -> None:
    trajectory = answer(tokenizer, "add\nso 3\nis 3").with_outcome(1.0, score_parts={"exact": 1.0})
    partial = partial_of(trajectory, tokenizer, "\n")
    assert [tokenizer.decode(step) for step in partial.steps] == ["add\n", "so 3\n", "is 3"]
    (rewarded,), about = process(Table(), tokenizer, transform=transform, weight=2.0, outcome_weight=0.5).apply([trajectory])
    expected = dict(zip(partial.ends, (2 * r for r in BY_HAND[transform]), strict=True))
    expected[partial.ends[-1]] += 0.5
    found = {i + 1: float(r) for i, r in enumerate(rewarded.rewards) if r or i + 1 in partial.ends}
    assert found == pytest.approx(expected)
    assert about["outcomes"] == [1.0] and about["process"]["truth"] == [1.0] and about["process"]["steps"] == [3]
    assert about["process"]["score"] == pytest.approx([{"raw": 0.5, "minimum": 0.25}.get(transform, 0.5)])


@pytest.mark.parametrize(
    ("algorithm", "turns"),
    [({"name": "poad"}, 1), ({"name": "poad", "settings": {"gamma_action": 0.8}}, 3), ({"name": "ppo_action"}, 3), ({"name": "grpo"}, 3)]
    + [({"name": "ntpo", "settings": {"gamma_token": 0.9, "gamma_action": 0.9}}, turns) for turns in (1, 3)],
)
def test_shaping_uses_the_discount_of_the_algorithm(algorithm: dict[str, Any], turns: int, tokenizer: Any) -> None:
    """The return that the algorithm itself computes of shaped rewards is -initial before the first token, whatever was written."""
    chosen = get_algorithm(algorithm["name"])
    token, action = chosen.discounts(chosen.settings(algorithm.get("settings", {})))
    builder = TrajectoryBuilder(id="a", group_id="g", task="test")
    for turn in range(turns):
        builder.add_env(tokenizer.encode("so:\n"), turn=turn)
        tokens = tokenizer.encode("add one and two\nis 3" if turn == 0 else "yes it is\nstop")
        builder.add_model(tokens, [0.0] * len(tokens), [0] * len(tokens), turn=turn)
        builder.set_duration(3 - turn)
    scorer, settings = Table((0.75, 0.25, 0.5, 0.9, 0.1, 0.6)), {"separator": "\n", "transform": "shaping", "initial": 0.3}
    reward = ProcessReward(ProcessRewardConfig(**settings), lambda: scorer, tokenizer, (token, action))
    ((rewarded,), about) = reward.apply([builder.build()])
    assert about["process"]["steps"] == [2 * turns]
    streams = flatten([rewarded])
    streams.values = torch.zeros(streams.n_tokens)
    if chosen.action_level:
        streams = action_streams(streams)
    rates = {"gamma_token": token, "gamma_action": action, "lambda_token": 1.0, "lambda_action": 1.0}
    worth = hierarchical_gae(streams, **rates, bootstrap_truncated=False).returns
    assert float(worth[0]) == pytest.approx(-0.3, abs=1e-5) and float(worth.abs().max()) > 0.35


def test_shaping_keeps_the_last_score_where_the_value_behind_it_counts(tokenizer: Any) -> None:
    """A cut episode is worth -initial and what is behind its end, whatever the steps scored."""
    token, action, behind = 0.9, 0.8, 2.0
    builder = TrajectoryBuilder(id="a", group_id="g", task="test")
    builder.add_env(tokenizer.encode("so:\n"), turn=0)
    tokens = tokenizer.encode("add one and two\nis 3")
    builder.add_model(tokens, [0.0] * len(tokens), [0] * len(tokens), turn=0)
    cut = builder.build(Status.TRUNCATED)
    settings = ProcessRewardConfig(separator="\n", transform="shaping", initial=0.3)
    worth = {}
    for scores in ((0.75, 0.25), (0.1, 0.9)):
        scorer = Table(scores)
        for bootstrap in ("truncated", "none"):
            reward = ProcessReward(settings, lambda scorer=scorer: scorer, tokenizer, (token, action), bootstrap)  # type: ignore[misc]
            ((rewarded,), _) = reward.apply([cut])
            streams = flatten([rewarded])
            streams.values = torch.zeros(streams.n_tokens)
            streams.bootstrap = torch.tensor([behind - scores[-1]])  # of shaped rewards the critic learns V - s
            rates = {"gamma_token": token, "gamma_action": action, "lambda_token": 1.0, "lambda_action": 1.0}
            worth[scores, bootstrap] = float(hierarchical_gae(streams, **rates, bootstrap_truncated=bootstrap == "truncated").returns[0])
    discount = token ** (len(tokens) - 1) * action
    for scores in ((0.75, 0.25), (0.1, 0.9)):
        assert worth[scores, "truncated"] == pytest.approx(discount * behind - 0.3, abs=1e-5)
        assert worth[scores, "none"] == pytest.approx(-0.3, abs=1e-5)


def test_turns_are_steps(tokenizer: Any) -> None:
    builder = TrajectoryBuilder(id="a", group_id="g", task="test")
    for turn, (seen, said) in enumerate([("start\n", "go\nnow"), ("wall\n", "left")]):
        builder.add_env(tokenizer.encode(seen), turn=turn)
        tokens = tokenizer.encode(said)
        builder.add_model(tokens, [0.0] * len(tokens), [0] * len(tokens), turn=turn)
    builder.add_env(tokenizer.encode("the end"), turn=1)
    trajectory = builder.build()
    assert [tokenizer.decode(s) for s in partial_of(trajectory, tokenizer, None).steps] == ["go\nnow", "wall\nleft"]
    assert [tokenizer.decode(s) for s in partial_of(trajectory, tokenizer, "\n").steps] == ["go\n", "now", "wall\nleft"]
    (rewarded,), _ = process(Table(), tokenizer, separator=None).apply([trajectory])
    assert not rewarded.rewards[~rewarded.loss_mask].any(), "only what the policy wrote is rewarded"
    assert rewarded.total_reward == 1.0


def test_several_contexts_are_refused(tokenizer: Any) -> None:
    builder = TrajectoryBuilder(id="a", group_id="g", task="test")
    for turn in range(2):
        builder.add_env([5, 6], turn=turn, new_context=bool(turn))
        builder.add_model([7], [0.0], [0], turn=turn)
    ((failed,), about) = process(Table(), tokenizer).apply([builder.build()])
    assert failed.status is Status.FAILED and "one context" in failed.info["error"] and about["unscored"] == {"ScoringError": 1}


@pytest.mark.parametrize("scorer", [Broken(), Table(spare=1), Table((math.nan,) * 3)])
def test_a_scorer_that_fails_is_a_status_and_no_zero(scorer: Any, tokenizer: Any) -> None:
    """A number of scores that is not that of the steps included: OpenR made a 0 of it."""
    good, cut = answer(tokenizer, "a\nb").with_outcome(1.0), answer(tokenizer, "c", Status.FAILED)
    rewarded, about = process(scorer, tokenizer).apply([good, cut])
    assert [t.status for t in rewarded] == [Status.FAILED, Status.FAILED]
    assert "process reward:" in rewarded[0].info["error"] and rewarded[0].info["error_type"] == "ScoringError"
    assert about["unscored"] == {"ScoringError": 1}, "one that had failed before is not counted again"
    assert "process" not in about


def test_a_group_is_normalised(tokenizer: Any) -> None:
    trajectories = [answer(tokenizer, "a\nb\nc"), answer(tokenizer, "a\nb")]
    rewarded, _ = process(Table(), tokenizer, normalise="group").apply(trajectories)
    rewards = [float(r) for t in rewarded for r in t.rewards if r]
    assert sum(rewards) == pytest.approx(0, abs=1e-5) and sum(r * r for r in rewards) / 5 == pytest.approx(1, abs=1e-5)


def test_a_group_without_an_answer_is_left_as_it_is(tokenizer: Any) -> None:
    failed = answer(tokenizer, "a", Status.FAILED)
    rewarded, about = process(Table(), tokenizer, normalise="group").apply([failed])
    assert rewarded == [failed] and about["unscored"] == {} and about["process"]["score"] == []


def test_the_scorer_path(tokenizer: Any) -> None:
    """Through the graders and the summary to the metrics: evaluations show the outcome alone."""
    scorer = Scorer(RewardTerms((Term("exact_match"),)), tokenizer, process=process(Table(), tokenizer, transform="minimum", weight=0.5))
    try:
        trajectories = [answer(tokenizer, "x\ny"), answer(tokenizer, "z")]
        _, summary = scorer.score_group(trajectories, Item(id="i", prompt="1 + 2 =", answer="z"))
    finally:
        scorer.close()
    assert summary["rewards"] == pytest.approx([0.125, 1.375]) and summary["outcomes"] == [0.0, 1.0]
    assert not summary["failed"] and summary["unscored"] == {}
    result = GroupResult(trajectories=None, summary=summary)
    figures = evaluation_metrics([result])
    assert figures["eval/accuracy"] == 0.5 and figures["eval/process/gap"] == pytest.approx(0.5)
    trained = step_metrics([result], trained_at=0, learned={}, phases={})
    assert trained["reward/mean"] == pytest.approx(0.75) and trained["process/correlation"] == pytest.approx(1)
    assert trained["process/steps"] == 1.5


def test_a_foreign_scorer_may_raise_anything(tokenizer: Any) -> None:
    ((failed,), about) = process(Foreign(), tokenizer).apply([answer(tokenizer, "a\nb")])
    assert failed.status is Status.FAILED and "someone else's mistake" in failed.info["error"]
    assert about["unscored"] == {"KeyError": 1}


def test_a_function_that_hangs_is_a_time_out_and_no_zero(tiny_model_dir: Path, tokenizer: Any) -> None:
    args = {"path": "tests.search.step_functions:hangs_on", "args": {"word": "b"}, "timeout_s": 0.3}
    process = {"scorer": "function", "args": args, "separator": "\n", "transform": "raw"}
    reward = ProcessReward.of(parse_config({"model": {"path": str(tiny_model_dir)}, "scoring": {"process": process}}), tokenizer)
    assert reward is not None
    ((hung,), about) = reward.apply([answer(tokenizer, "a\nb")])
    assert hung.status is Status.FAILED and about["unscored"] == {"Timeout": 1} and "process" not in about
    assert (hung.info["score_status"], hung.info["error_type"]) == ("timeout", "Timeout") and "within 0.3 s" in hung.info["error"]
    ((good,), about) = reward.apply([answer(tokenizer, "a\nc")])
    assert good.status is Status.FINISHED and good.total_reward == 2.0 and about["unscored"] == {}


def test_a_failed_group_says_why(tokenizer: Any) -> None:
    scorer = Scorer(RewardTerms((Term("exact_match"),)), tokenizer, process=process(Broken(), tokenizer))
    try:
        _, summary = scorer.score_group([answer(tokenizer, "x")], Item(id="i", prompt="p", answer="z"))
    finally:
        scorer.close()
    assert summary["failed"] and "process reward: the actor is gone" in summary["error"]
    assert summary["unscored"] == {"ScoringError": 1} and math.isnan(summary["rewards"][0])


def test_what_a_job_asks_for(tiny_model_dir: Path, tokenizer: Any) -> None:
    tree = {"model": {"path": str(tiny_model_dir)}, "scoring": {"process": {"scorer": "function", "args": {"path": "operator:index"}}}}
    config = parse_config(tree)
    assert ProcessReward.of(parse_config({"model": {"path": str(tiny_model_dir)}}), tokenizer) is None
    reward = ProcessReward.of(config, tokenizer)
    assert reward is not None
    ((failed,), _) = reward.apply([answer(tokenizer, "x")])
    assert "operator:index raised TypeError" in failed.info["error"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("{scorer: likelihood}", "likelihood asks the policy's engine"),
        ("{normalise: group, transform: minimum, args: {model: somewhere}}", "with a mean of 0 every step"),
        ("{scorer: prm}", r"scoring\.process\.args\.model: must be given"),
        ("{scorer: prm, args: {model: m, wrkers: 2}}", r"wrkers: unknown key; did you mean 'workers'"),
        ("{scorer: prm, args: {model: m}, separator: 0}", r"scoring\.process\.separator: must be a text"),
        ("{scorer: pmr}", r"unknown step scorer 'pmr'; did you mean 'prm'"),
        ("{transform: minimum, weigth: 1}", r"scoring\.process\.weigth: unknown key; did you mean scoring\.process\.weight"),
    ],
)
def test_bad_settings(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"scoring.process={setting}"])


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_shaping_is_refused_where_only_sums_are_compared(name: str) -> None:
    """Its sum is the same for every answer, so the process reward model would have no say, without a word."""
    shaped = [f"algorithm.name={name}", "scoring.process={args: {model: somewhere}, transform: shaping}"]
    with pytest.raises(ConfigError, match=rf"transform: shaping adds up to the same .* {name} compares sums"):
        load_config(None, shaped)
    load_config(None, [*shaped, "algorithm.settings.credit=action"])
    load_config(None, [shaped[0], "scoring.process={args: {model: somewhere}, transform: minimum}"])
    load_config(None, ["algorithm.name=poad", shaped[1]])
