"""A search as an episode: spans are steps, log-probs are the policy's, and the right answer is out of reach."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from reasoner_ray.config import parse_config
from reasoner_ray.data.tasks import Item, Task
from reasoner_ray.errors import ConfigError
from reasoner_ray.rollout.engine import Sampling
from reasoner_ray.rollout.episodes import EPISODES, EpisodeContext
from reasoner_ray.rollout.worker import RolloutWorker
from reasoner_ray.scoring.base import RewardTerms, Term
from reasoner_ray.scoring.scorer import Scorer
from reasoner_ray.search.results import accuracy_by, make_record, recorded_samples, summarise_results
from reasoner_ray.search.tree import from_json
from reasoner_ray.trajectory import Status, Trajectory
from tests.search.step_functions import TARGET
from tests.search.toy import EOS, NEWLINE, PROMPT, TOKENIZER, DigitEngine, job


class Hidden:
    """A right answer that nobody may look at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError("the search looked at the answer")

    def __str__(self) -> str:
        raise AssertionError("the search looked at the answer")


class Toy(Task):
    name = "toy"

    def train(self) -> Sequence[Item]:
        return [ITEM]

    def held_out(self) -> Sequence[Item]:
        return []

    def read_answer(self, text: str) -> str:
        return text.replace("\n", "")


ITEM = Item(id="q1", prompt="user: q\n", answer=Hidden())


def run(episode: str, engine: Any, *, samples: int = 1, method: str = "mcts", tokens: int = 16, **search: Any) -> list[Trajectory]:
    config = job(method, search.pop("settings", {"width": 24, "paths": 6}), **search)
    context = EpisodeContext(
        engine=engine,
        tokenizer=TOKENIZER,
        task=Toy(),
        sampling=Sampling(max_new_tokens=tokens),
        max_context=64,
        max_turns=1,
        group_id="g1",
        samples=samples,
        agent=config.rollout.agent,
        candidates=None,  # type: ignore[arg-type]
        hosts=None,  # type: ignore[arg-type]
        config=config,
    )
    return asyncio.run(EPISODES.get(episode)(context, ITEM))


def test_the_chosen_path_is_a_trajectory_with_a_span_a_step() -> None:
    trajectories = run("search", DigitEngine(), samples=3)
    assert [t.id for t in trajectories] == ["g1/0", "g1/1", "g1/2"]
    for t in trajectories:
        assert t.info["text"] == "2\n1\n2" and t.status is Status.FINISHED
        spans = [s for s in t.spans if s.kind == "model"]
        assert [s.step for s in spans] == [0, 1, 2] and {s.turn for s in spans} == {0}
        assert t.tokens[: spans[0].start].tolist() == PROMPT
        assert [int(t.tokens[s.end - 1]) for s in spans] == [NEWLINE, NEWLINE, EOS]
        expected = [np.log(0.2), 0, np.log(0.3), 0, np.log(0.2), 0]
        np.testing.assert_allclose(t.behaviour_logprobs[t.loss_mask], expected, atol=1e-6)
        assert set(t.policy_versions[t.loss_mask]) == {3}
        assert t.info["metrics"]["unsolved"] == 0 and t.info["metrics"]["generated"] > 0


def test_a_search_without_a_solution_gives_its_longest_way_or_a_plain_sample() -> None:
    (cut,) = run("search", DigitEngine(), depth=2)
    assert cut.status is Status.TRUNCATED and cut.info["metrics"]["unsolved"] == 1 and cut.trainable_tokens == 4
    (plain,) = run("search", DigitEngine(lines=0), tokens=8)
    assert plain.status is Status.TRUNCATED and plain.trainable_tokens == 8


@pytest.mark.parametrize("episode", ["search", "search_solutions"])
def test_a_scorer_that_hangs_makes_a_failed_search_and_no_wrong_one(episode: str) -> None:
    scorer = {"name": "function", "args": {"path": "tests.search.step_functions:hangs_on", "args": {"word": "1"}, "timeout_s": 0.3}}
    (failed,) = run(episode, DigitEngine((1, 1, 1)), scorer=scorer)
    assert failed.status is Status.FAILED and failed.trainable_tokens == 0
    assert failed.info["error_type"] == "Timeout" and "no answer within 0.3 s" in failed.info["error"]
    if episode == "search_solutions":
        record = make_record(0, ITEM, [failed], [float("nan")])
        assert record["correct"] is None and record["ended"] == "failed" and record["cost"]["generated"] > 0
        assert "Timeout" in record["problem"] and summarise_results([record])["unjudged"] == 1


def test_all_solutions_come_back_the_chosen_one_first_and_trees_can_be_read() -> None:
    trajectories = run("search_solutions", DigitEngine(), save_trees=True, settings={"width": 24, "paths": 12, "c_init": 20.0})
    first = trajectories[0].info
    assert first["solution"]["answer"] == first["search"]["answer"] == TARGET
    assert all("search" not in t.info for t in trajectories[1:])
    places = sorted(place for t in trajectories for place in t.info["solution"]["found_at"])
    assert places == list(range(12)) and first["search"]["found"] == 12, "ways gone again count again"
    root, chosen = from_json(first["search"]["tree"])
    assert chosen.partial.tokens == tuple(trajectories[0].tokens.tolist())
    assert sum(1 for _ in root.walk()) == first["search"]["nodes"] + 1 and root.visits == 12


def test_what_was_found_is_judged_after_the_search() -> None:
    """The same solutions give the accuracy of every way to choose among them."""
    item = Item(id="q1", prompt="user: q\n", answer="2\n1\n2")
    scorer = Scorer(RewardTerms((Term("exact_match"),)), TOKENIZER)
    try:
        trajectories = run("search_solutions", DigitEngine((1, 1, 1)), method="best_of_n", settings={"paths": 300})
        judged, summary = scorer.score_group(trajectories, item)
        nothing, none_summary = scorer.score_group(run("search_solutions", DigitEngine(lines=0), tokens=8), item)
    finally:
        scorer.close()
    record = make_record(0, item, judged, summary["rewards"])
    assert record["correct"] in (0.0, 1.0) and len(record["solutions"]) == 300
    by = accuracy_by([record])
    assert by["last/max"] == 1.0, "the scorer knows the target"
    assert set(by) == {"majority", *(f"{s}/{a}" for s in ("last", "min", "mean", "product") for a in ("vote", "max"))}
    (sampled,) = recorded_samples([record])
    assert len(sampled.groups) == 300 and sum(sampled.correct) == sum(s["correct"] for s in record["solutions"])
    empty = make_record(1, item, nothing, none_summary["rewards"])
    assert empty["solutions"] == [] and empty["correct"] == 0.0 and empty["cost"]["cut"] > 0
    both = summarise_results([record, empty])
    assert both["unsolved"] == 1 and both["accuracy"] == pytest.approx(record["correct"] / 2)
    assert both["cost"]["generated"] == (record["cost"]["generated"] + empty["cost"]["generated"]) / 2


def test_a_worker_runs_searches_and_greedy_evaluations_alike() -> None:
    """``rollout.episode: search`` in a job: the worker hands the job's section to the episode."""
    config = parse_config(
        {
            "name": "t",
            "rollout": {"episode": "search", "max_new_tokens": 16, "max_context": 200},
            "search": {"method": "beam", "step_tokens": 4, "settings": {"paths": 2, "width": 3}},
        }
    )

    async def story() -> None:
        worker = RolloutWorker(config, AnyPrompt(), TOKENIZER)
        item = worker._task.train()[0]
        trajectories, summary = await worker.run_group(item, "g0", 2)
        assert len(trajectories) == 2 and summary["failed"] is False
        assert [t.info["metrics"]["unsolved"] for t in trajectories] == [0.0, 0.0]

    asyncio.run(story())


def test_a_search_asks_chats_in_the_models_template() -> None:
    """Not in ChatML, whatever the model: the reference code's bug."""
    config = parse_config(
        {
            "name": "t",
            "task": {"name": "game24", "args": {"style": "chat"}},
            "rollout": {"episode": "search_solutions", "max_new_tokens": 16, "max_context": 400},
            "search": {"method": "beam", "step_tokens": 4, "settings": {"paths": 1, "width": 2}},
        }
    )
    engine = AnyPrompt()
    worker = RolloutWorker(config, engine, TOKENIZER)
    item = worker._task.train()[0]
    asyncio.run(worker.run_group(item, "g0", 1))
    chat = TOKENIZER.apply_chat_template(item.prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert engine.asked and all(prompt[: len(chat)] == list(chat) for prompt in engine.asked)
    assert "<|im_start|>" not in TOKENIZER.decode(engine.asked[0])


class AnyPrompt(DigitEngine):
    """Ends a solution with its first line, as the arithmetic task does."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[int]] = []

    async def generate(self, prompt: Any, sampling: Sampling, n: int = 1, order: str = "") -> Any:
        self.asked.append(list(prompt))
        return await super().generate(PROMPT, sampling, n, order)


def test_a_search_at_another_temperature_than_the_learners_is_refused() -> None:
    tree: dict[str, Any] = {"name": "t", "rollout": {"episode": "search", "temperature": 0.8}, "search": {"temperature": 1.0}}
    with pytest.raises(ConfigError, match=r"search\.temperature=1 is not rollout\.temperature=0\.8: .*biased"):
        parse_config(tree)
    assert parse_config({**tree, "search": {"temperature": 0.8}}).search.temperature == 0.8
    assert parse_config({**tree, "rollout": {"temperature": 0.8}}).search.temperature == 1.0, "where nothing is learnt of it"


def test_truncated_sampling_is_refused_where_it_is_trained_on() -> None:
    with pytest.raises(ConfigError, match=r"search\.top_p/top_k: .*constant bias"):
        parse_config({"name": "t", "rollout": {"episode": "search"}, "search": {"top_k": 40}})
    assert parse_config({"name": "t", "search": {"top_k": 40}}).search.top_k == 40
