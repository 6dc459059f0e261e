"""Several tasks at once: moments, settings, figures and warnings of each; and what measures transfer between them."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import mat_transfer
from reasoner_ray.agents.mat.driver import evaluation, evaluation_of_tasks
from reasoner_ray.agents.mat.learner import MatLearner
from reasoner_ray.agents.mat.worker import RolloutWorker
from reasoner_ray.config import load_config, parse_config, to_yaml
from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.envs.multi_agent.spec import TeamSpec
from reasoner_ray.envs.multi_agent.tasks import task_settings
from reasoner_ray.envs.multi_agent.teams import Episode
from reasoner_ray.errors import ConfigError
from reasoner_ray.trainer.checkpoint import list_checkpoints
from tests.agents.mat.test_driver import driver
from tests.agents.mat.test_learner import job, pair
from tests.agents.mat.test_transfer import CROWD, TASKS, crowd, several

ISLAND = "tests.agents.mat.worlds:make_island"


# -- moments ---------------------------------------------------------------------------------------------------


def learner_of_two(config: Any) -> MatLearner:
    workers = [RolloutWorker(config, index) for index in range(2)]
    return MatLearner(config, team=workers[0].team, others=[workers[1].team])


def test_each_task_goes_on_with_its_own_moments_and_another_number_of_tasks_begins_anew(tmp_path: Path) -> None:
    learner = learner_of_two(several(tmp_path))
    for norm, returns in zip(learner.value_norms, (torch.tensor([1.0, 3.0]), torch.tensor([1000.0, 3000.0])), strict=True):
        norm.update(returns, torch.ones(2))
    assert [norm.moments for norm in learner.value_norms] == [pytest.approx((2.0, 1.0)), pytest.approx((2000.0, 1000.0))]
    learner.export(tmp_path / "model")
    learner.save(tmp_path / "state")
    path = {"model": {"path": str(tmp_path / "model")}}
    tuned, resumed = learner_of_two(several(tmp_path, **path)), learner_of_two(several(tmp_path))
    resumed.load(tmp_path / "state")
    for other in (tuned, resumed):
        assert [norm.moments for norm in other.value_norms] == [norm.moments for norm in learner.value_norms]
    alone = crowd(tmp_path, multi_agent={"args": {"n": 4}}, **path)
    assert pair(alone)[0].value_norms[0].moments == (0.0, 1.0), "of neither task"


def test_files_from_before_each_task_had_moments_hold_one_state_for_all(tmp_path: Path) -> None:
    learner = learner_of_two(several(tmp_path))
    learner.save(tmp_path / "state")
    (file,) = (tmp_path / "state").glob("rank-*.pt")
    state = torch.load(file, weights_only=False)
    state["counters"]["value_norm"] = {"mean": 1.0, "square": 2.0, "weight": 0.5}
    torch.save(state, file)
    learner.load(tmp_path / "state")
    assert [norm.moments for norm in learner.value_norms] == [(2.0, 0.1)] * 2
    before, worker = pair(crowd(tmp_path))
    before.export(tmp_path / "model")
    about = next(f for f in (tmp_path / "model").glob("*.json") if "value_norm" in f.read_text())
    about.write_text(json.dumps(json.loads(about.read_text()) | {"value_norm": state["counters"]["value_norm"]}))
    tuned = MatLearner(crowd(tmp_path, model={"path": str(tmp_path / "model")}), team=worker.team)
    assert tuned.value_norms[0].moments == (2.0, 0.1)


# -- sizes -----------------------------------------------------------------------------------------------------


def test_a_network_whose_inputs_lie_elsewhere_is_no_network_for_this_team(tmp_path: Path) -> None:
    """Three agents that see five numbers and four that see four: eight numbers in both, in other places."""
    five, four = (
        RolloutWorker(crowd(tmp_path, multi_agent={"args": {"n": n}, "pad": {"observation": pad}}), 0).team for n, pad in ((3, 5), (4, 4))
    )
    assert five.observation == four.observation == 8
    assert five.misfit(four) == (
        "observations of 8 numbers (5 seen, 3 for the agent's number), actions of 3 choices and 0 dimensions there; "
        "observations of 8 numbers (4 seen, 4 for the agent's number), actions of 3 choices and 0 dimensions here"
    )
    assert five.misfit(five) == "" and "5 seen" in five.difference(
        TeamSpec(agents=five.agents, observation=8, actions=five.actions, number=4)
    )
    old = five.to_dict()
    del old["number"]
    assert TeamSpec.from_dict(old).misfit(four) == "", "of old files it is not known"


# -- settings --------------------------------------------------------------------------------------------------


def test_errors_of_a_task_name_it() -> None:
    tasks = {"two": {"args": {"n": 2}}, "odd": {"args": {"m": 2}}}
    with pytest.raises(ConfigError, match=r"^multi_agent\.tasks\.odd: multi_agent\.args\.m: unknown key"):
        task_settings(MultiAgentConfig(name=CROWD, tasks=tasks))


def test_a_task_of_another_environment_has_its_own_arguments_alone_and_null_undoes_the_section(tmp_path: Path) -> None:
    section = {"args": {"length": 7}, "max_steps": 3, "faulty": {"agent_0": "all"}}
    tasks = {
        "other": {"name": ISLAND, "args": {"length": 4}, "faulty": None},
        "same": {"name": CROWD, "args": {"n": 3}, "max_steps": None},
        "plain": {},
    }
    config = crowd(tmp_path, multi_agent={**section, "tasks": tasks}, rollout={"workers": 3})
    assert config.multi_agent.task("other").args == {"length": 4} and config.multi_agent.task("other").faulty == {}
    assert config.multi_agent.task("same").args == {"length": 7, "n": 3} and config.multi_agent.task("same").max_steps is None
    assert config.multi_agent.task("plain").max_steps == 3 and config.multi_agent.task("plain").faulty == {"agent_0": "all"}
    assert list(task_settings(config.multi_agent)) == ["other", "same", "plain"]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "config.yaml")
    assert all(again.multi_agent.task(label) == config.multi_agent.task(label) for label in tasks), "what is written means the same"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "rl", "multi_agent": {"tasks": TASKS}}, r"multi_agent\.tasks: kind rl does not play several tasks"),
        ({"kind": "rl", "tracking": {"video_every": 1}}, r"tracking\.video_every: kind rl draws no episodes in training"),
        ({"kind": "agdc", "trainer": {"eval_samples": 2}}, r"trainer\.eval_samples: kind agdc is not evaluated by sampled answers"),
        ({"kind": "prm", "trainer": {"eval_samples": 2}}, r"trainer\.eval_samples: kind prm is not evaluated by sampled answers"),
        ({"kind": "mat", "trainer": {"eval_samples": 2}}, r"trainer\.eval_samples: kind mat is not evaluated by sampled answers"),
        ({"kind": "mat", "multi_agent": {"faulty": {"agent_0": []}}}, r"multi_agent\.faulty: agent_0 has no dimension that is held"),
        ({"kind": "mat", "multi_agent": {"tasks": {"a": {"faulty": {"b": []}}}}}, r"tasks\.a\.faulty: b has no dimension that is held"),
    ],
)
def test_what_nothing_comes_of_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(tree)


# -- figures and warnings --------------------------------------------------------------------------------------


def test_the_difference_between_tasks_is_no_noise() -> None:
    def episodes(*totals: float) -> list[Episode]:
        return [Episode(env=0, total=x, steps=1, truncated=False) for x in totals]

    low, high = episodes(0.0, 2.0), episodes(100.0, 104.0)
    figures = evaluation_of_tasks([low, high], ["low", "high"])
    each = [evaluation(own)["eval/return_ci95"] for own in (low, high)]
    assert figures["eval/return"] == 51.5
    assert figures["eval/return_ci95"] == pytest.approx((each[0] ** 2 + each[1] ** 2) ** 0.5 / 2) and figures["eval/return_ci95"] < 3
    assert [figures[f"eval/return_ci95/{label}"] for label in ("low", "high")] == each
    assert evaluation_of_tasks([low], [])["eval/return_ci95"] == each[0]


def test_a_task_whose_episodes_never_end_is_told_of_although_another_s_do(tmp_path: Path) -> None:
    tasks = {"short": {"args": {"length": 2}}, "long": {"args": {"length": 9}}}
    world = {"name": ISLAND, "args": {}, "envs": 1, "segment_steps": 4, "tasks": tasks}
    run = driver(job(tmp_path, multi_agent=world, rollout={"workers": 2}, trainer={"eval_tasks": 0, "steps": 3}))
    asyncio.run(run.run())
    (told,) = [text for text in run.parts.tracker.events if "anew" in text]
    assert told.startswith("no episode of long ended in the 4 steps between two checkpoints")


def test_a_resumed_run_films_when_the_whole_run_would_have(tmp_path: Path) -> None:
    def filmed(config: Any, checkpoint: Path | None = None) -> list[int]:
        run, steps = driver(config), []
        run.parts.tracker.video = lambda step, *_: steps.append(step)  # type: ignore[method-assign]
        asyncio.run(run.run(checkpoint))
        return steps

    def config(steps: int) -> Any:
        return crowd(tmp_path, trainer={"steps": steps, "eval_every": 1}, tracking={"video_every": 3})

    assert filmed(config(1)) == [0]
    assert filmed(config(4), list_checkpoints(tmp_path / "run")[-1]) == [3], "the third after the first, not the first after the resume"


# -- the measurement of transfer -------------------------------------------------------------------------------


def test_transfer_is_measured_on_runs_of_the_job_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    code = 0

    def run_it(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        started.append(command[-1])
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run_it)
    args = argparse.Namespace(out=tmp_path, episodes=2, tiny=False, set=[])
    file = mat_transfer.JOBS / "simple_spread.yaml"
    run = tmp_path / "side-seed1"

    def train(*options: str, **given: Any) -> Path:
        return mat_transfer.train(file, "side", 1, args, *options, **given)

    assert train("trainer.steps=4") == run and started == ["--overwrite"]
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    (run / "checkpoints" / "step-000002" / "MANIFEST.json").touch()
    fixed = ["name=side-seed1", "seed=1", f"out={tmp_path}", "tracking.wandb=off", "trainer.eval_tasks=2", "trainer.steps=4"]
    (run / "config.yaml").write_text(to_yaml(load_config(file, fixed)))
    train("trainer.steps=4")
    assert started.pop() == "resume", "one that was interrupted"
    with pytest.raises(ConfigError, match=r"was begun otherwise \(mat\.width: 64, not 8\)"):
        train("trainer.steps=4", "mat.width=8")
    (run / "model").mkdir()
    (run / "metrics.jsonl").write_text('{"step": 4}\n')
    train("trainer.steps=4")
    assert started == ["--overwrite"], "a finished one is looked at as it is"
    with pytest.raises(ConfigError, match=r"was trained otherwise \(mat\.width: 64, not 8\)"):
        train("trainer.steps=4", "mat.width=8")
    train("trainer.steps=6")
    assert started.pop() == "resume", "a longer one goes on"
    for steps, given in ((2, {}), (6, {"grows": False})):
        with pytest.raises(ConfigError, match=f"has 4 training steps, not {steps}"):
            train(f"trainer.steps={steps}", **given)
    with pytest.raises(ConfigError, match="learner.lr_schedule: constant, not linear"):
        train("trainer.steps=6", "learner.lr_schedule=linear")
    code = 3
    with pytest.raises(SystemExit, match="side-seed1 failed with exit code 3"):
        train("trainer.steps=6")


@pytest.mark.parametrize("job_file", sorted(file.name for file in mat_transfer.JOBS.glob("*.yaml")))
def test_a_tiny_measurement_asks_for_nothing_that_an_environment_does_not_have(job_file: str) -> None:
    before = load_config(mat_transfer.JOBS / job_file).multi_agent
    tiny = load_config(mat_transfer.JOBS / job_file, mat_transfer.tiny(mat_transfer.JOBS / job_file)).multi_agent
    assert tiny.args.keys() == before.args.keys() and 5 in (tiny.max_steps, tiny.args.get("max_cycles"))


def test_the_faulty_joint_is_not_among_those_that_are_pre_trained_on() -> None:
    before, after = (load_config(mat_transfer.JOBS / f"half_cheetah_{name}.yaml").multi_agent for name in ("pretrain", "faulty"))
    faults = [before.task(label).faulty for label in before.tasks]
    assert after.faulty == {"agent_0": "all"} and {} in faults and len(faults) == 4
    assert all("agent_0" not in fault for fault in faults) and before.args == after.args
