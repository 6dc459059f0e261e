"""What a folder of weights is taken for: settings of equal shape but another meaning, and observations shown otherwise, are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reasoner_ray.agents.mat.launch import evaluate, train
from reasoner_ray.agents.mat.learner import MatLearner, load_network
from reasoner_ray.agents.mat.worker import RolloutWorker
from reasoner_ray.agents.weights import ABOUT
from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.envs.multi_agent.spec import ActionLayout, Sight, TeamSpec
from reasoner_ray.errors import ModelError
from tests.agents.mat.test_learner import job, pair


@pytest.mark.parametrize(
    ("mat", "message"),
    [
        ({"heads": 2}, r"mat\.heads was 1 and is 2 here; set them as they were"),
        ({"value_norm": False}, r"mat\.value_norm was true and is false here"),
        ({"heads": 4, "value_norm": False}, r"mat\.heads was 1 and is 4 here, mat\.value_norm was true and is false here"),
    ],
)
def test_settings_that_leave_every_shape_as_it_was_are_compared(tmp_path: Path, mat: dict[str, Any], message: str) -> None:
    learner, worker = pair(job(tmp_path))
    learner.export(tmp_path / "model")
    other = job(tmp_path, mat=mat, model={"path": str(tmp_path / "model")})
    with pytest.raises(ModelError, match=message):
        MatLearner(other, team=worker.team)
    with pytest.raises(ModelError, match=message):
        load_network(tmp_path / "model", worker.team, other.mat)
    load_network(tmp_path / "model", worker.team)  # as it was trained


def test_how_it_learns_may_change_and_what_was_not_saved_is_not_known(tmp_path: Path) -> None:
    learner, worker = pair(job(tmp_path))
    learner.export(tmp_path / "model")
    path = {"path": str(tmp_path / "model")}
    MatLearner(job(tmp_path, mat={"clip": 0.1, "gamma": 0.9, "advantage": "joint", "order": "shuffled"}, model=path), team=worker.team)
    about = tmp_path / "model" / ABOUT
    tree = json.loads(about.read_text())
    del tree["mat"]["value_norm"]
    about.write_text(json.dumps(tree))
    MatLearner(job(tmp_path, mat={"value_norm": False}, model=path), team=worker.team)


def shown(own: int, features: list[tuple[int, int]] | None = None, standardise: bool = False, widest: int = 10) -> TeamSpec:
    """Two agents that see ``own`` numbers, laid out on ``widest`` places before their number."""
    sight = Sight.of([own, own], MultiAgentConfig(features=features, standardise=standardise))
    actions = ActionLayout(choices=(3, 3), dims=(0, 0))
    return TeamSpec(agents=("a", "b"), observation=widest + 2, number=2, actions=actions, sight=sight)


def test_observations_that_are_shown_otherwise_do_not_fit() -> None:
    plain, small, large = shown(10), shown(6, [(2, 4), (4, 6)]), shown(8, [(3, 4), (5, 6)])
    for team in (plain, small, large):
        assert TeamSpec.from_dict(json.loads(json.dumps(team.to_dict()))) == team
        assert not team.misfit(replace(team, sight=None)) and not replace(team, sight=None).misfit(team), "of old files it is not known"
    assert plain.misfit(shown(10, standardise=True)) == "multi_agent.standardise=false there, true here"
    assert plain.difference(shown(10, standardise=True)) == "multi_agent.standardise=false there, true here"
    assert small.misfit(large) == small.misfit(plain) == plain.misfit(large) == "", "the same parts; ten numbers may be four and six"
    assert small.misfit(shown(6, [(3, 5), (3, 5)])) == "multi_agent.features padded to [4, 6] there, padded to [5, 5] here"
    assert small.misfit(shown(6)) == "multi_agent.features padded to [4, 6] there, none here", "six numbers in a row, then zeros"
    assert shown(6).misfit(shown(8)) == shown(6).misfit(shown(6, [(4, 4), (2, 6)])) == "", "all padding comes last in both"


@pytest.mark.parametrize("settings", [{"standardise": True}, {"pad": {"observation": 4}, "features": [(1, 2), (1, 1), (1, 1)]}])
def test_a_network_that_was_shown_its_observations_otherwise_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    world = {"name": "tests.agents.mat.worlds:make_crowd", "args": {"n": 3}, "pad": {"observation": 4}}
    config = job(tmp_path, multi_agent=world)
    team = RolloutWorker(config, 0).team
    known = replace(team, sight=Sight.of([3, 3, 3], config.multi_agent))
    MatLearner(config, team=known).export(tmp_path / "model")
    other = job(tmp_path, multi_agent=world | settings, model={"path": str(tmp_path / "model")})
    here = replace(team, sight=Sight.of([3, 3, 3], other.multi_agent))
    with pytest.raises(ModelError, match=r"network of other sizes or observations \(multi_agent\.\w+.* here\); give both jobs the same"):
        MatLearner(other, team=here)
    with pytest.raises(ModelError, match=r"multi_agent\.\w+.* there, .* here"):
        load_network(tmp_path / "model", here)
    load_network(tmp_path / "model", known)


def test_train_and_eval_refuse_before_anything_starts(tmp_path: Path) -> None:
    """The environments say how they show observations, so that the command line can compare; no Ray is needed for that."""
    learner, worker = pair(job(tmp_path))
    assert worker.team.sight == Sight(own=(2, 1, 3))
    learner.export(tmp_path / "model")
    model = str(tmp_path / "model")
    standardised = {"name": "tests.agents.mat.worlds:make_island", "standardise": True}
    with pytest.raises(ModelError, match=r"multi_agent\.standardise=false there, true here"):
        evaluate(job(tmp_path, multi_agent=standardised), model)
    with pytest.raises(ModelError, match=r"multi_agent\.standardise=false there, true here"):
        train(job(tmp_path, multi_agent=standardised, model={"path": model}))
    with pytest.raises(ModelError, match=r"mat\.heads was 1 and is 2 here"):
        train(job(tmp_path, mat={"heads": 2}, model={"path": model}))
