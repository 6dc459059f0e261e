"""Which jobs a round is made of, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reasoner_ray.config import JobConfig, derived_numbers, parse_config
from reasoner_ray.errors import ConfigError
from reasoner_ray.rounds.plan import Phase, model_after, plan

SEARCH: dict[str, Any] = {
    "name": "loop",
    "kind": "rounds",
    "out": "runs",
    "model": {"path": "start"},
    "task": {"name": "game24"},
    "search": {"method": "mcts_alpha", "settings": {"width": 5}, "scorer": {"name": "prm", "args": {"threads": 1}}, "items": 40},
    "learner": {"critic": "shared", "updates_per_step": 2},
    "trainer": {"tasks_per_step": 4},
}
REWARDS: dict[str, Any] = {
    **SEARCH,
    "search": {"items": 40},
    "scoring": {"process": {"args": {"model": "judge"}, "separator": "\n", "transform": "minimum"}},
    "rounds": {"recipe": "process_rewards"},
}


def job(tree: dict[str, Any] = SEARCH, **rounds: Any) -> JobConfig:
    return parse_config({**tree, "rounds": {**tree.get("rounds", {}), **rounds}})


def by_name(config: JobConfig, number: int) -> dict[str, Phase]:
    return {phase.name: phase for phase in plan(config, number)}


def test_a_round_of_search_goes_from_model_to_model() -> None:
    config = job(questions=30, samples=6)
    assert list(by_name(config, 0)) == ["samples", "value", "greedy", "searched"]
    assert list(by_name(config, 2)) == ["search", "policy", "value", "greedy", "searched"]
    first, second = by_name(config, 1), by_name(config, 2)
    assert first["search"].config.model.path == "start", "the current policy searches"
    assert first["search"].config.search.scorer.args == {"threads": 1, "model": "runs/loop/round-00/value/model"}
    assert (first["search"].config.search.split, first["search"].config.search.items) == ("train", 30)
    assert second["search"].config.model.path == second["policy"].config.model.path == "runs/loop/round-01/policy/model"
    assert second["value"].config.model.path == "runs/loop/round-01/value/model", "it goes on learning"
    for name in ("greedy", "searched"):
        here = second[name].config
        assert here.model.path == "runs/loop/round-02/policy/model" and (here.search.split, here.search.items) == ("held_out", 40)
    assert second["searched"].config.search.scorer.args["model"] == "runs/loop/round-02/value/model"
    assert (second["searched"].config.search.method, second["greedy"].config.search.method) == ("mcts_alpha", "greedy")
    assert (second["policy"].config.kind, second["value"].config.kind) == ("sft", "value")
    assert (second["policy"].config.learner.critic, second["value"].config.learner.critic) == ("none", "joint")
    assert second["value"].config.run_dir == Path("runs/loop/round-02/value")
    assert model_after(config, 2, "policy") == "runs/loop/round-02/policy/model"


def test_old_and_new_samples_are_learnt_the_newest_first() -> None:
    sources = by_name(job(), 2)["value"].sources
    assert [str(path) for path in sources] == [
        f"runs/loop/{folder}/search/results.jsonl" for folder in ("round-02/search", "round-01/search", "round-00/samples")
    ]
    for phase in (by_name(job(), 2)["policy"], by_name(job(), 2)["value"]):
        assert phase.config.supervised.data == (str(phase.learns),) and phase.learns.parent == Path("runs/loop/round-02")
    assert all(by_name(job(), 2)[name].config.search.save_tokens for name in ("search",))


def test_a_value_model_that_is_given_is_not_made() -> None:
    tree = {**SEARCH, "search": {**SEARCH["search"], "scorer": {"name": "prm", "args": {"model": "mine"}}}}
    assert list(by_name(job(tree), 0)) == ["greedy", "searched"]
    assert by_name(job(tree), 1)["search"].config.search.scorer.args == {"model": "mine"}
    assert by_name(job(tree), 1)["value"].config.model.path == "mine"
    assert len(by_name(job(tree), 1)["value"].sources) == 1, "there are no plain samples"


def test_a_phase_has_settings_of_its_own() -> None:
    phases = {
        "policy": {"learner": {"lr": 0.5}, "supervised": {"data": ["task", "more.jsonl"]}},
        "search": {"search": {"method": "beam", "settings": {"paths": 2}}},
    }
    found = by_name(job(phases=phases), 1)
    assert found["policy"].config.learner.lr == 0.5 != found["value"].config.learner.lr
    assert found["policy"].config.supervised.data == (str(found["policy"].learns), "task", "more.jsonl")
    assert found["policy"].extra == ("task", "more.jsonl") and found["value"].extra == ()
    assert (found["search"].config.search.method, found["search"].config.search.settings) == ("beam", {"paths": 2})
    assert found["searched"].config.search.settings == {"width": 5}


def test_a_round_of_process_rewards_refreshes_its_model() -> None:
    config = job(REWARDS, samples=3)
    assert list(by_name(config, 0)) == ["greedy", "judged"]
    found = by_name(config, 2)
    assert list(found) == ["rl", "labels", "prm", "greedy", "judged", "judged_anew"]
    process = found["rl"].config.scoring.process
    assert process is not None and process.args == {"model": "runs/loop/round-01/prm/model"}
    assert found["rl"].config.model.path == "runs/loop/round-01/rl/model" and found["rl"].config.learner.updates_per_step == 2
    assert found["labels"].config.model.path == "runs/loop/round-02/rl/model", "rollouts of what the policy has become"
    assert found["labels"].config.labels.separator == "\n" and found["labels"].config.scoring.process is None
    assert found["prm"].config.model.path == "runs/loop/round-01/prm/model", "training is continued"
    assert found["prm"].config.supervised.data == (
        "runs/loop/round-02/labels/labels/labels.jsonl",
        "runs/loop/round-01/labels/labels/labels.jsonl",
    )
    old, new = found["judged"].config.search, found["judged_anew"].config.search
    assert old.scorer.args["model"] == "runs/loop/round-01/prm/model" and new.scorer.args["model"] == "runs/loop/round-02/prm/model"
    assert old.settings == {"paths": 3} and old.steps == "min", "the score that RL drives up"
    assert old.model_copy(update={"scorer": new.scorer}) == new, "the same solutions by both"


def test_what_only_the_policy_has_a_use_for_stays_with_its_phases() -> None:
    """A critic that learns alone, a limit on the policy's way, sampled evaluations: refused in a phase that trains a judge."""
    learner = {**REWARDS.get("learner", {}), "critic_warmup": 1, "max_kl": 0.1}
    config = job({**REWARDS, "learner": learner, "trainer": {**REWARDS.get("trainer", {}), "steps": 4, "eval_samples": 3}})
    phases = by_name(config, 1)
    assert (phases["rl"].config.learner.critic_warmup, phases["rl"].config.learner.max_kl) == (1, 0.1)
    assert phases["rl"].config.trainer.eval_samples == phases["greedy"].config.trainer.eval_samples == 3
    prm = phases["prm"].config
    assert (prm.learner.critic_warmup, prm.learner.max_kl, prm.trainer.eval_samples) == (0, None, 0)


def test_a_model_may_be_kept_fixed() -> None:
    found = by_name(job(REWARDS, refresh=False), 2)
    assert list(found) == ["rl", "greedy", "judged"]
    process = found["rl"].config.scoring.process
    assert process is not None and process.args == {"model": "judge"}
    assert model_after(job(REWARDS, refresh=False), 2, "judge") == "judge"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"search": {}}, r"search\.scorer\.name: the value model .* set it to prm"),
        ({"supervised": {"data": ["a.jsonl"]}}, r"supervised\.data: .*rounds\.phases\.PHASE\.supervised\.data"),
        ({"search": {**SEARCH["search"], "split": "train"}}, r"search\.split: .*held_out"),
        ({"rounds": {"recipe": "process_rewards"}}, r"scoring\.process: .* begins with a process reward model"),
        ({"rounds": {"phases": {"polcy": {}}}}, r"rounds\.phases\.polcy: unknown phase; did you mean 'policy'"),
        ({"rounds": {"phases": {"policy": {"learner": {"lrr": 1}}}}}, r"rounds\.phases\.policy: learner\.lrr: unknown key; .*learner\.lr"),
        ({"rounds": {"phases": {"value": {"supervised": {"data": ["task"]}}}}}, r"rounds\.phases\.value: supervised\.data: a task has"),
        ({"rounds": {"phases": {"policy": {"kind": "prm"}}}}, r"rounds\.phases\.policy\.kind: is the loop's own"),
        ({"rounds": {"n": -1}}, r"rounds\.n: .*greater than or equal to 0"),
    ],
)
def test_what_cannot_work_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**SEARCH, **tree})


def test_a_dry_run_tells_the_phases() -> None:
    assert derived_numbers(job())["phases of a round"] == "search, policy, value, greedy, searched"
