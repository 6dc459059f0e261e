"""Searches learnt by RLlib under the run's own steps, checkpoints and tracking; evaluation, calibration, animation, what is refused."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_flatten

from reasoner_ray.agents.agdc import source_problem
from reasoner_ray.agents.agdc.belief import FAULTS
from reasoner_ray.agents.agdc.cessation import Calibration
from reasoner_ray.agents.agdc.deepspeed_learner import gather_optimizers
from reasoner_ray.agents.agdc.launch import (
    AgdcDriver,
    AlgorithmRunner,
    Parts,
    _check_resumable,
    _shape,
    animate_run,
    check_room,
    evaluate,
    make_arena,
    train,
)
from reasoner_ray.agents.agdc.rllib import TrainedPolicy, algorithm_config, make_search
from reasoner_ray.agents.agdc.source_problem import scale_observation
from reasoner_ray.config import JobConfig, load_config, to_yaml
from reasoner_ray.errors import CheckpointError, ConfigError, DataError, LearnerLost, ModelError
from reasoner_ray.plot import plot_runs
from reasoner_ray.trainer.checkpoint import list_checkpoints
from reasoner_ray.trainer.tracking import Tracker

ROOT = Path(__file__).parents[3]
TINY = [
    *("agdc.belief.particles=40", "agdc.environment.max_steps=25", "agdc.episodes_at_once=4", "agdc.hidden=[16]"),
    *("tracking.wandb=off", "tracking.terminal=off", "trainer.eval_tasks=6", "trainer.eval_every=0", "agdc.steps_per_iteration=64"),
]
PPO = ["agdc.settings.train_batch_size_per_learner=64", "agdc.settings.minibatch_size=32", "agdc.settings.num_epochs=1"]
REPLAY = ["agdc.settings.num_steps_sampled_before_learning_starts=16", "agdc.settings.train_batch_size_per_learner=16"]


def job(out: Path, name: str, *overrides: str) -> JobConfig:
    own = PPO if name.startswith("ppo") else REPLAY
    return load_config(ROOT / "jobs" / "agdc" / f"{name}.yaml", [f"out={out}", *TINY, *own, *overrides])


def run(config: JobConfig, resume_from: Path | None = None) -> tuple[AgdcDriver, dict[str, torch.Tensor]]:
    """A run to its end, and the policy's weights."""
    tracker = Tracker(config, config.run_dir, resume=resume_from is not None)
    driver = AgdcDriver(config, Parts(learners=AlgorithmRunner(config), tracker=tracker))

    async def whole() -> dict[str, torch.Tensor]:
        try:
            await driver.run(resume_from)
            weights: dict[str, Any] = driver.parts.learners._algorithm.get_module().state_dict()
            return {name: value.clone() for name, value in weights.items()}
        finally:
            await driver.stop()
            tracker.finish("finished")

    return driver, asyncio.run(whole())


@pytest.mark.slow
def test_a_run_writes_what_it_did_and_goes_on_from_its_checkpoint(ray_cluster: Any, tmp_path: Path) -> None:
    config = job(tmp_path, "ppo", "trainer.steps=2", "trainer.checkpoint_every=1", "trainer.keep_checkpoints=3")
    driver, weights = run(config)
    assert driver.finished
    assert driver.last_eval["eval/episodes"] == 6
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[2]["episode/actions_in_all"] >= 128
    assert "reward/mean" in lines[2]
    assert "learner/total_loss" in lines[2]

    exported = TrainedPolicy.load(config.run_dir / "model", config.agdc)
    assert all(torch.equal(value, weights[name]) for name, value in exported._module.state_dict().items())

    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    assert animate_run(config.run_dir, tmp_path / "search.gif") in (
        "the agent ends its search",
        "the agent is not sure before its time is up",
    )
    with Image.open(tmp_path / "search.gif") as gif:
        assert 2 <= gif.n_frames <= 26  # type: ignore[attr-defined]
    drawn = plot_runs([config.run_dir], tmp_path / "curves.png")
    assert {"eval/success", "eval/steps", "eval/wrong_stops"} <= set(drawn)

    checkpoints = list_checkpoints(config.run_dir)
    assert [path.name for path in checkpoints] == ["step-000001", "step-000002"]
    longer = config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": 3})})
    resumed, later = run(longer, checkpoints[-1])
    assert resumed.step == 3
    assert any(not torch.equal(value, weights[name]) for name, value in later.items()), "it went on learning"
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[3]["episode/actions_in_all"] > lines[2]["episode/actions_in_all"], "counters go on too"
    with pytest.raises(CheckpointError, match="the job has"):
        run(job(tmp_path, "ppo", "agdc.hidden=[8]"), checkpoints[-1])


@pytest.mark.parametrize("name", ["ppo", "dqn", "ddpg", "ppo_without_agdc"])
def test_runners_are_given_searches(name: str, tmp_path: Path) -> None:
    config = job(tmp_path, name)
    made = algorithm_config(config)
    made.validate()
    env = make_search({**made.env_config, "num_envs": 3})
    shown, _ = env.reset(seed=1)
    for _ in range(30):
        shown, _, terminated, _, _ = env.step(env.action_space.sample())
    assert env.single_observation_space.contains(shown[0])
    if not config.agdc.detect:
        assert not terminated.any()
        raw = env.unwrapped.core.observe()  # type: ignore[attr-defined]
        assert torch.equal(torch.as_tensor(shown), scale_observation(raw, config.agdc.environment))


def test_planners_are_evaluated_animated_and_calibrated_on(tmp_path: Path) -> None:
    files = [f"agdc.gif={tmp_path / 'search.gif'}", f"agdc.calibrate={tmp_path / 'fit.json'}"]
    dcee = ["agdc.policy=dcee", "agdc.cessation.threshold=1.5", "trainer.eval_tasks=100"]
    figures = evaluate(job(tmp_path, "ppo", *dcee, *files))
    assert figures["eval/episodes"] == 100
    assert figures["eval/success_low"] <= figures["eval/success"] <= figures["eval/success_high"]
    with Image.open(tmp_path / "search.gif") as gif:
        assert 2 <= gif.n_frames <= 26  # type: ignore[attr-defined]
    fit = Calibration.load(tmp_path / "fit.json")
    narrow, wide = fit.probability(torch.tensor([[-1.0, 2.0, 2.0, 3.0, 0.5], [1.5, -3.0, 1.0, 3.0, 2.0]]))
    assert narrow > wide
    assert evaluate(job(tmp_path, "ppo", *dcee)) == figures, "seeds fix the episodes, whatever else is asked for"


def test_a_job_with_the_calibrated_rule_fits_it_and_gives_runners_the_numbers(tmp_path: Path) -> None:
    file = tmp_path / "fit.json"
    config = job(tmp_path, "ppo_calibrated", "agdc.policy=dcee", "trainer.eval_tasks=60", f"agdc.cessation.calibration={file}")
    with pytest.raises(DataError, match="no calibration at .* fit one: reasoner eval"):
        evaluate(config)
    fitting = config.model_copy(update={"agdc": config.agdc.model_copy(update={"calibrate": str(file)})})
    assert evaluate(fitting) == evaluate(config), "the figures are those of the new fit"
    given = algorithm_config(config).env_config
    file.unlink()  # runners on other machines have no such file
    env: Any = make_search({**given, "num_envs": 2})
    env.reset(seed=1)
    env.step(env.action_space.sample())


def test_actors_that_no_node_can_hold_are_refused(tmp_path: Path) -> None:
    made = algorithm_config(job(tmp_path, "ppo", "rollout.workers=3", "rollout.cpus=2"))
    check_room(made, [{"CPU": 4.0}, {"CPU": 2.0}])
    with pytest.raises(ConfigError, match=r"3 env runners of rollout\.cpus=2 .* do not fit .*\(3, 3 CPUs\)"):
        check_room(made, [{"CPU": 3.0}, {"CPU": 3.0}])
    with pytest.raises(ConfigError, match=r"2 learners of learner\.cpus"):
        check_room(algorithm_config(job(tmp_path, "ppo", "learner.ranks=2")), [{"CPU": 1.0}])
    check_room(algorithm_config(job(tmp_path, "ppo")), [])
    made = algorithm_config(job(tmp_path, "ppo", "rollout.workers=3", "agdc.belief.device=cuda", "agdc.belief.gpu_share=0.5"))
    check_room(made, [{"CPU": 3.0, "GPU": 2.0}])
    with pytest.raises(ConfigError, match=r"3 env runners of agdc\.belief\.gpu_share=0\.5 do not fit on the cluster's 1 GPUs"):
        check_room(made, [{"CPU": 3.0, "GPU": 1.0}])
    blind = algorithm_config(job(tmp_path, "ppo_without_agdc", "rollout.workers=3", "agdc.belief.device=cuda"))
    assert blind.num_gpus_per_env_runner == 0, "nothing of it is on a GPU"


class Idle:
    """An algorithm whose env runners are gone."""

    local_replay_buffer = None

    def train(self) -> dict[str, Any]:
        return {"env_runners": {"num_env_steps_sampled_lifetime": 64}}


def test_an_iteration_without_a_step_is_an_error(tmp_path: Path) -> None:
    runner = AlgorithmRunner(job(tmp_path, "ppo"))
    runner._algorithm = Idle()
    asyncio.run(runner.train_step())
    with pytest.raises(LearnerLost, match="played no step"):
        asyncio.run(runner.train_step())


@pytest.mark.slow
def test_what_is_replayed_is_kept(ray_cluster: Any, tmp_path: Path) -> None:
    config = job(tmp_path, "dqn")

    async def whole() -> tuple[Any, Any, dict[str, float]]:
        first, second = AlgorithmRunner(config), AlgorithmRunner(config)
        try:
            await first.start()
            figures = await first.train_step()
            await first.save(tmp_path / "kept")
            await second.start()
            await second.load(tmp_path / "kept")
            return first._algorithm.local_replay_buffer, second._algorithm.local_replay_buffer, figures
        finally:
            await first.stop()
            await second.stop()

    before, after, figures = asyncio.run(whole())
    assert before.get_num_timesteps() == after.get_num_timesteps() > 0
    assert [e.id_ for e in before.episodes] == [e.id_ for e in after.episodes]
    assert {name for name in figures if name.startswith("faults/belief_")} == {f"faults/belief_{name}" for name in (*FAULTS, "unreadable")}


@pytest.mark.long
def test_what_two_ranks_share_is_kept(ray_cluster: Any, tmp_path: Path) -> None:
    config = job(tmp_path, "ppo", "learner.ranks=2", "agdc.learner=deepspeed", "learner.zero_stage=1")

    def optimizer(runner: AlgorithmRunner) -> list[Any]:
        """Every rank's share of the optimiser's moments."""
        group = runner._algorithm.learner_group
        gather_optimizers(group)
        shares = group.get_state(components="learner/optimizer")["learner"]["optimizer"]["deepspeed"]
        states = [torch.load(io.BytesIO(share), weights_only=False)["base_optimizer_state"] for share in shares]
        return [value for state in states for value in tree_flatten(state)[0] if isinstance(value, torch.Tensor) and value.numel() > 1]

    async def whole() -> tuple[list[Any], list[Any], list[Any]]:
        first, second = AlgorithmRunner(config), AlgorithmRunner(config)
        try:
            await first.start()
            await first.train_step()
            await first.save(tmp_path / "kept")
            await second.start()
            fresh = optimizer(second)
            await second.load(tmp_path / "kept")
            return optimizer(first), optimizer(second), fresh
        finally:
            await first.stop()
            await second.stop()

    before, after, fresh = asyncio.run(whole())
    assert len(before) == len(after) >= 4, "two moments on each rank"
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not fresh or not torch.equal(before[0], fresh[0]), "there was something to restore"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["agdc.algorithm=dqn", "agdc.environment.moves=heading"], r"agdc\.algorithm: dqn chooses among moves"),
        (["agdc.algorithm=ddpg"], r"agdc\.algorithm: ddpg learns a heading"),
        (["learner.zero_stage=1"], r"learner\.zero_stage: RLlib's own learner has none"),
        (["agdc.learner=deepspeed", "learner.zero_stage=3"], r"learner\.zero_stage: .* take 2 or below"),
        (
            ["agdc.problem=object_search", "agdc.tolerance=0.5", "agdc.belief.device=cuda"],
            r"agdc\.belief\.device: .*object_search has none",
        ),
        (["agdc.belief.device=gpu"], r"agdc\.belief\.device: .*'cpu' or 'cuda'"),
        (["agdc.feedback.patience=500"], r"agdc\.feedback\.patience: 500 steps are more than an episode has \(200\)"),
        (["agdc.feedback.min_steps=201"], r"agdc\.feedback\.min_steps: 201 steps are more"),
        (["agdc.feedback.stop=.inf"], r"agdc\.feedback: .*must be finite"),
        (["agdc.cessation.calibration=fit.json"], r"agdc\.cessation\.calibration: rule spread reads none"),
        (["agdc.environment.speed=.inf"], r"agdc\.environment\.speed: .*finite number"),
        (["agdc.environment.scene.width=0"], r"agdc\.environment\.scene\.width: .*greater than 0"),
        (["agdc.belief.particels=3"], r"particels: unknown key; did you mean agdc\.belief\.particles"),
    ],
)
def test_what_cannot_work_is_refused_when_the_job_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "jobs" / "agdc" / "ppo.yaml", overrides)


def test_what_cannot_work_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"agdc\.settings: ppo of RLlib does not take them: .*lambada"):
        train(job(tmp_path, "ppo", "agdc.settings.lambada=1"))
    with pytest.raises(ConfigError, match=r"agdc\.settings: ppo of RLlib does not take them: .*minibatch_size"):
        train(job(tmp_path, "ppo", "agdc.settings.minibatch_size=9999"))
    with pytest.raises(ConfigError, match=r"agdc\.policy is for `reasoner eval`"):
        train(job(tmp_path, "ppo", "agdc.policy=dcee"))
    with pytest.raises(ConfigError, match=r"model\.path: a training of kind agdc begins with a new network"):
        train(job(tmp_path, "ppo", f"model.path={tmp_path}"))
    with pytest.raises(ConfigError, match=r"threshold: 0\.0 can never be met"):
        train(job(tmp_path, "ppo", "agdc.cessation.threshold=0.0"))
    with pytest.raises(ModelError, match="no trained policy at"):
        evaluate(job(tmp_path, "ppo", f"model.path={tmp_path}"))
    assert not (tmp_path / "agdc-ppo").exists()


def test_a_run_goes_on_with_the_ranks_that_share_its_optimiser(tmp_path: Path) -> None:
    split = ["agdc.learner=deepspeed", "learner.zero_stage=1", "learner.ranks=2"]
    state = {"agdc": _shape(job(tmp_path, "ppo", *split))}
    _check_resumable(state, job(tmp_path, "ppo", *split))
    for other in (["learner.ranks=3"], ["learner.zero_stage=2"], ["learner.zero_stage=0"]):
        with pytest.raises(CheckpointError, match="the job has"):
            _check_resumable(state, job(tmp_path, "ppo", *split, *other))
    whole = {"agdc": _shape(job(tmp_path, "ppo", "learner.ranks=2"))}
    _check_resumable(whole, job(tmp_path, "ppo"))  # a whole optimiser's state is the same on every rank
    _check_resumable({"agdc": {"algorithm": "ppo"}}, job(tmp_path, "ppo", *split))  # of an older version, which said less


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = job(tmp_path, "ppo", "agdc.belief.device=cuda")
    with pytest.raises(ConfigError, match=r"agdc\.belief\.device: cuda, but PyTorch sees no GPU"):
        train(config)
    with pytest.raises(ConfigError, match=r"agdc\.belief\.device"):
        evaluate(job(tmp_path, "ppo", "agdc.belief.device=cuda", "agdc.policy=dcee"))
    with pytest.raises(ConfigError, match=r"agdc\.belief\.device"):
        make_search({**algorithm_config(config).env_config, "num_envs": 2})
    assert not config.run_dir.exists()


def test_the_device_reaches_beliefs_and_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("SourceBelief", "SourceTermBatch"):
        monkeypatch.setattr(source_problem, name, lambda *given, _name=name, **more: made.update({_name: [*given, *more.values()]}))
    problem = source_problem.SourceTermProblem(job(tmp_path, "ppo", "agdc.belief.device=cuda").agdc)
    problem.belief(2)
    problem.search(2)
    assert "cuda" in made["SourceBelief"]
    assert "cuda" in made["SourceTermBatch"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["ppo", "ddpg"])  # moves, and a heading
def test_beliefs_of_a_gpu_are_evaluated(name: str, tmp_path: Path) -> None:
    config = job(tmp_path, name, "agdc.belief.device=cuda")
    for policy in ("dcee", "infotaxis", "entrotaxis", "random", "oracle"):
        files = [f"agdc.gif={tmp_path / 'search.gif'}", "agdc.belief.device=cuda", f"agdc.policy={policy}"]
        figures = evaluate(job(tmp_path, name, *files))
        assert figures["eval/episodes"] == 6
        assert all(torch.isfinite(torch.tensor(list(figures.values()))))
    env = make_search({**algorithm_config(config).env_config, "num_envs": 2})
    made = algorithm_config(config).get_rl_module_spec(spaces={"default_policy": (env.single_observation_space, env.single_action_space)})
    found = make_arena(config.agdc).run(TrainedPolicy(made.build(), config.agdc), 3)
    assert found.error.device.type == "cpu"
    assert torch.isfinite(found.error).all()


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("ppo", ["rollout.workers=2"]),
        ("ppo", ["learner.ranks=2"]),
        ("ppo", ["learner.ranks=2", "agdc.learner=deepspeed"]),
        ("ppo", ["learner.ranks=2", "agdc.learner=deepspeed", "learner.zero_stage=1"]),
        ("ddpg", ["learner.ranks=2", "agdc.learner=deepspeed", "learner.zero_stage=2"]),
        ("dqn", []),
        ("ddpg", []),
        ("ddpg", ["agdc.learner=deepspeed", "learner.zero_stage=1"]),
        ("ppo", ["agdc.learner=deepspeed", "learner.zero_stage=1"]),
    ],
)
def test_each_algorithm_trains_resumes_and_is_evaluated_from_the_command_line(name: str, overrides: list[str], tmp_path: Path) -> None:
    own = [f"out={tmp_path}", *TINY, *(PPO if name == "ppo" else REPLAY), *overrides]
    command = [sys.executable, "-m", "reasoner_ray.cli"]
    path = str(ROOT / "jobs" / "agdc" / f"{name}.yaml")
    subprocess.run([*command, "train", path, *own, "trainer.steps=2", "trainer.checkpoint_every=1"], check=True, timeout=280)
    folder = tmp_path / f"agdc-{name}"
    subprocess.run([*command, "train", str(folder / "config.yaml"), "trainer.steps=3", "--resume"], check=True, timeout=280)
    shown = subprocess.run(
        [*command, "eval", str(folder / "config.yaml"), "--model", str(folder / "model")], check=True, capture_output=True, text=True
    )
    assert "eval/success:" in shown.stdout
