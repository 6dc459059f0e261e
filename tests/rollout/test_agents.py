"""Language agents in environments: what their trajectories hold, what they forget, and what a bad environment costs."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.data.tasks import get_task
from reasoner_ray.errors import ConfigError
from reasoner_ray.packing import pack
from reasoner_ray.rollout.engine import check_room
from reasoner_ray.rollout.worker import RolloutWorker
from reasoner_ray.scoring.base import reward_terms
from reasoner_ray.scoring.scorer import Scorer
from reasoner_ray.trajectory import Status, Trajectory, flatten
from tests.rollout.fakes import ScriptedEngine
from tests.rollout.worlds import Corridor

WORLD = "tests.rollout.worlds:Corridor"


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def job(folder: Path, rollout: dict[str, Any], args: dict[str, Any] | None = None, **kwargs: Any) -> JobConfig:
    return parse_config(
        {
            "model": {"path": str(folder)},
            "task": {"name": "environment", "args": {"id": WORLD, "kwargs": kwargs, "isolate": False, "episodes": 4, **(args or {})}},
            "rollout": {"episode": "admissible", "max_context": 256, "max_new_tokens": 8, "max_turns": 10, **rollout},
        }
    )


def play(
    tiny: Path, tokenizer: Any, rollout: dict[str, Any], n: int = 1, mode: Any = "train", answer: str = "", control: str = "", **kwargs: Any
) -> tuple[list[Trajectory], dict[str, Any], ScriptedEngine]:
    """One group by a scripted engine."""
    config = job(tiny, rollout, **kwargs)
    config = config.model_copy(update={"task": config.task.model_copy(update={"control": control})})
    engine = ScriptedEngine(lambda _: (tokenizer.encode(answer), "stop"))

    async def run() -> Any:
        worker = RolloutWorker(config, engine, tokenizer)
        try:
            return await worker.run_group(get_task(config.task, config.seed).train()[0], "g7", n, mode)
        finally:
            worker._hosts.close()

    trajectories, summary = asyncio.run(run())
    return trajectories, summary, engine


def texts(trajectory: Trajectory, tokenizer: Any, kind: str) -> list[str]:
    return [tokenizer.decode(trajectory.tokens[s.start : s.end].tolist()) for s in trajectory.spans if s.kind == kind]


def test_an_episode_chooses_from_the_lists_until_the_end(tiny_model_dir: Path, tokenizer: Any) -> None:
    trajectories, summary, _ = play(tiny_model_dir, tokenizer, {}, n=8)
    assert not summary["failed"]
    for t in trajectories:
        actions, seen = texts(t, tokenizer, "model"), texts(t, tokenizer, "env")
        assert set(actions) <= {" go left", " go right"} and seen[0] == "room 0, you"
        assert t.status is (Status.FINISHED if actions[-2:] == [" go right"] * 2 else Status.TRUNCATED)
        assert t.total_reward == t.info["metrics"]["success"] == float(t.status is Status.FINISHED)
        assert t.info["metrics"]["turns"] == len(actions) <= 6
        assert t.info["transcript"] == " | ".join(a.strip() for a in actions)
        for span in (s for s in t.spans if s.kind == "model"):
            assert span.choice is not None and len(span.choice.candidates) == 2 and span.choice.divisors == (2.0, 2.0)
            assert np.exp(t.behaviour_logprobs[span.start : span.end].sum()) < 1
    assert len({t.info["transcript"] for t in trajectories}) > 1, "samples differ"


@pytest.mark.parametrize("budget", [0, 6, 200])
def test_every_context_begins_with_the_control_text(tiny_model_dir: Path, tokenizer: Any, budget: int) -> None:
    (t,), _, _ = play(tiny_model_dir, tokenizer, {"agent": {"history_tokens": budget}}, control="Quality 1 of 1.\n")
    heads = [tokenizer.decode(t.tokens[start:].tolist()) for start in t.context_starts]
    assert len(heads) > 1 or budget == 200
    assert all(head.startswith("Quality 1 of 1.\nroom") for head in heads)
    assert tokenizer.decode(t.tokens.tolist()).count("Quality") == len(heads), "once in each"


def test_the_same_seed_gives_the_same_episode_and_greedy_the_likeliest(tiny_model_dir: Path, tokenizer: Any) -> None:
    first, again = (play(tiny_model_dir, tokenizer, {}, n=3)[0] for _ in range(2))
    assert [t.info["transcript"] for t in first] == [t.info["transcript"] for t in again]
    ((greedy,), _, engine) = play(tiny_model_dir, tokenizer, {}, mode="eval")
    one = greedy.spans[1].choice
    assert one is not None
    scores = [sum(-(token % 7) / 2 for token in c) / n for c, n in zip(one.candidates, one.divisors, strict=True)]
    assert one.chosen == int(np.argmax(scores))
    assert len(set(texts(greedy, tokenizer, "model"))) == 1, "a greedy policy does the same in the same room"
    assert len({tuple(p) for p in engine.scored}) == len(engine.scored), "equal states are scored once"


@pytest.mark.parametrize("budget", [0, 1000, 14])
def test_earlier_turns_stay_as_long_as_the_budget_allows(tiny_model_dir: Path, tokenizer: Any, budget: int) -> None:
    (t,), _, _ = play(tiny_model_dir, tokenizer, {"agent": {"history_tokens": budget}}, lists=True)
    spans = [s for s in t.spans if s.kind == "model"]
    assert len(spans) > 1
    contexts = [tokenizer.decode(t.tokens[s.context_start : s.start].tolist()) for s in spans]
    actions = texts(t, tokenizer, "model")
    if budget == 0:
        assert all(c.startswith("room") and c.endswith(", you") and "\n" not in c for c in contexts)
        assert len({s.context_start for s in spans}) == len(spans)
    elif budget == 1000:
        assert {s.context_start for s in spans} == {0}
        assert contexts[1].startswith(f"{contexts[0]}{actions[0]}\nroom")
    else:
        for before, after, action in zip(contexts, contexts[1:], actions, strict=False):
            last = before.rsplit("\n", 1)[-1]
            assert after.rsplit("\n", 1)[0].endswith(last + action) or "\n" not in after
        assert all(len(tokenizer.encode(c.rsplit("\n", 1)[0])) <= budget + 2 for c in contexts if "\n" in c)
    assert flatten([t]).n_tokens == t.trainable_tokens
    assert sum(b.n_trained for b in pack([t], tokens_per_microbatch=1000)) == t.trainable_tokens


def test_free_text_is_parsed_by_the_environment_and_nonsense_is_punished(tiny_model_dir: Path, tokenizer: Any) -> None:
    settings = {"episode": "free_text", "agent": {"invalid_penalty": 0.25}}
    (good,), _, _ = play(tiny_model_dir, tokenizer, settings, answer=" go right", lists=False)
    assert (good.status, good.total_reward, good.info["metrics"]["invalid"]) == (Status.FINISHED, 1.0, 0.0)
    assert all(s.choice is None for s in good.spans)
    (bad,), _, _ = play(tiny_model_dir, tokenizer, settings, answer=" dance", lists=False, limit=4)
    assert (bad.status, bad.info["metrics"]["invalid"]) == (Status.TRUNCATED, 1.0)
    assert bad.rewards[bad.loss_mask].sum() == pytest.approx(-1.0)


def test_the_reasons_of_failed_actions_are_counted(tiny_model_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons, plain = iter(["MemoryLimit", None, "CpuLimit", "MemoryLimit"]), Corridor.step

    def step(self: Corridor, action: str) -> Any:
        *answer, info = plain(self, action)
        return *answer, {**info, "error_type": next(reasons)}

    monkeypatch.setattr(Corridor, "step", step)
    (t,), _, _ = play(tiny_model_dir, tokenizer, {"episode": "free_text"}, answer=" dance", lists=False, limit=4)
    assert t.status is Status.TRUNCATED and t.info["error_types"] == {"MemoryLimit": 2, "CpuLimit": 1}


@pytest.mark.parametrize(("how", "kind"), [("raise", "raised"), ("nan", "reward_not_finite")])
def test_a_broken_environment_costs_one_episode_and_is_counted(
    tiny_model_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, how: str, kind: str
) -> None:
    monkeypatch.setattr(Corridor, "failures_left", 2)
    trajectories, summary, _ = play(tiny_model_dir, tokenizer, {"agent": {"max_failures": 2}}, n=3, how=how)
    assert not summary["failed"] and all(t.status.is_trainable for t in trajectories)
    reward = reward_terms(job(tiny_model_dir, {}).scoring, job(tiny_model_dir, {}).task)
    _, scored = Scorer(reward, tokenizer).score_group(trajectories, get_task(job(tiny_model_dir, {}).task).train()[0])
    assert scored["environment_failures"] == {kind: 2} and scored["label"] == "training"
    assert WORLD in scored["environment_errors"][kind] and ("the door is shut" if how == "raise" else "nan") in str(scored)
    assert len(scored["metrics"]["success"]) == 3


@pytest.mark.parametrize(("how", "kind"), [("die", "died"), ("hang", "timeout")])
def test_a_process_that_dies_or_hangs_costs_its_episode_and_is_named(how: str, kind: str, tiny_model_dir: Path, tokenizer: Any) -> None:
    args = {"isolate": True, "timeout_s": 5}
    (t,), summary, _ = play(tiny_model_dir, tokenizer, {"agent": {"max_failures": 0}}, args=args, how=how)
    assert t.status is Status.FAILED and t.info["environment_failures"] == {kind: 1} and t.info["error_type"] == kind
    assert summary["failed"] and "Corridor" in summary["error"]


def test_an_environment_that_never_ends_is_cut_and_counted(tiny_model_dir: Path, tokenizer: Any) -> None:
    """What it earned so far counts, the episode is known as cut, and no reward is made up."""
    trajectories, summary, _ = play(tiny_model_dir, tokenizer, {"max_turns": 4}, n=6, limit=10**9)
    for t in trajectories:
        unended = t.info["metrics"]["success"] == 0
        assert t.unended == unended == t.goes_on("unended"), "a critic looks beyond the cut"
        assert t.info["metrics"]["unended"] == float(unended) == float(t.status is Status.TRUNCATED)
    assert not summary["failed"]
    (ended,), _, _ = play(tiny_model_dir, tokenizer, {}, limit=1)
    assert ended.info["metrics"]["unended"] == 0.0, "the environment's own limit"


@pytest.mark.parametrize("limit", range(8, 24))
def test_a_prompt_that_nearly_fills_the_context_ends_the_episode_and_not_the_job(
    tiny_model_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    score = ScriptedEngine.next_logprobs

    async def with_room(self: ScriptedEngine, prompt: list[int], *arguments: Any) -> list[float]:
        check_room(prompt, limit, 10**9)
        return await score(self, prompt, *arguments)

    monkeypatch.setattr(ScriptedEngine, "next_logprobs", with_room)
    rollout = {"max_context": limit, "max_new_tokens": 4, "agent": {"history_tokens": 100}}
    (t,), summary, _ = play(tiny_model_dir, tokenizer, rollout)
    first, longest = len(tokenizer.encode("room 0, you")), max(len(tokenizer.encode(a)) for a in (" go left", " go right"))
    if first + longest > limit:
        assert t.status is Status.FAILED
        assert f"its first observation and an action take {first + longest} tokens; set rollout.max_context" in summary["error"]
    else:
        assert t.status.is_trainable and t.trainable_tokens and len(t.tokens) - max(t.context_starts) <= limit


def test_an_environment_that_always_fails_fails_its_group_by_name(
    tiny_model_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Corridor, "failures_left", 99)
    (t,), summary, _ = play(tiny_model_dir, tokenizer, {}, how="raise")
    assert t.status is Status.FAILED and t.info["environment_failures"] == {"raised": 2}
    assert summary["failed"] and "the door is shut" in summary["error"]


def test_lists_are_needed_where_actions_are_chosen(tiny_model_dir: Path, tokenizer: Any) -> None:
    (t,), summary, _ = play(tiny_model_dir, tokenizer, {}, lists=False)
    assert t.status is Status.FAILED and "gave no admissible actions" in summary["error"]
    config = parse_config({"model": {"path": str(tiny_model_dir)}, "rollout": {"episode": "admissible"}})

    async def run() -> None:
        worker = RolloutWorker(config, ScriptedEngine(lambda _: ([1], "stop")), tokenizer)
        await worker.run_group(get_task(config.task).train()[0], "g", 1)

    with pytest.raises(ConfigError, match="this episode plays environments; task.name=arithmetic has none"):
        asyncio.run(run())


def test_actions_that_a_tokenizer_does_not_tell_apart_fail_their_episode(tiny_model_dir: Path, tokenizer: Any) -> None:
    blind = copy.deepcopy(tokenizer)
    blind.backend_tokenizer.normalizer = normalizers.Lowercase()
    (t,), summary, _ = play(tiny_model_dir, blind, {}, lists=["go left", "Go Left"])
    assert t.status is Status.FAILED and "the same tokens" in summary["error"] and "'Go Left'" in summary["error"]
    (good,), _, _ = play(tiny_model_dir, tokenizer, {}, lists=["go left", "Go Left"])
    assert good.status is Status.TRUNCATED
