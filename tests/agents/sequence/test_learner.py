"""The learner and the driver of kind sequence: losses by hand, resume, online steps, refusals; and one whole run through Ray."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from reasoner_ray.agents.pool import Collected
from reasoner_ray.agents.sequence.collect import collect
from reasoner_ray.agents.sequence.driver import Parts, SequenceDriver, evaluation, spearman
from reasoner_ray.agents.sequence.launch import evaluate, make_player, train
from reasoner_ray.agents.sequence.learner import SequenceLearner, Temperature
from reasoner_ray.agents.sequence.network import load_network
from reasoner_ray.agents.sequence.player import Player
from reasoner_ray.agents.sequence.settings import OnlineConfig
from reasoner_ray.agents.sequence.windows import sample
from reasoner_ray.agents.stepwise import FIRST_EVAL_SEED
from reasoner_ray.agents.weights import ABOUT
from reasoner_ray.config import JobConfig, derived_numbers, to_yaml
from reasoner_ray.envs.multi_agent.teams import Episode
from reasoner_ray.errors import CheckpointError, ConfigError, ModelError, NonFiniteError
from reasoner_ray.trainer.checkpoint import list_checkpoints
from tests.agents.sequence.jobs import PENDULUM, job
from tests.trainer.fakes import FakeTracker
from tests.trainer.local import LocalLearner


class LocalPlayers:
    """The pool's interface over a player in this process."""

    def __init__(self, config: JobConfig) -> None:
        self._player = Player(config)
        self.restarts, self.played = 0, []

    async def start(self) -> None: ...

    async def load(self, published: Any) -> None:
        self._player.load(published)

    async def play(self, seeds: Sequence[int], target: float) -> list[Collected]:
        self.played.append((list(seeds), target))
        found = self._player.play(seeds, target)
        return [Collected(segment=found, summary={"returns": [r.total for r in found], "lengths": [len(r) for r in found]})]

    async def evaluate(self, seeds: Sequence[int], target: float) -> list[Episode]:
        return self._player.evaluate(seeds, target)

    async def stop(self) -> None: ...


class LocalLearners(LocalLearner):
    """The ranks' interface over a learner in this process."""

    def __init__(self, config: JobConfig) -> None:
        self._config = config

    async def start(self) -> None:
        self.learner = SequenceLearner(self._config)

    async def train_step(self, played: Any) -> dict[str, float]:
        return self.learner.train_step(played)

    async def publish_weights(self) -> Any:
        return list(self.learner.state_for_sync())


def driver(config: JobConfig, data: str = "the data") -> SequenceDriver:
    parts: Any = Parts(workers=LocalPlayers(config), learners=LocalLearners(config), tracker=FakeTracker(), data=data)  # type: ignore[arg-type]
    return SequenceDriver(config, parts)


def weights(learner: SequenceLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.state_for_sync()}


def without_clock(steps: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    timed = ("time/", "learner/seconds", "learner/updates_per_s")
    return {step: {k: v for k, v in metrics.items() if not k.startswith(timed)} for step, metrics in steps.items()}


@pytest.mark.parametrize("online", [False, True])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path: Path, online: bool) -> None:
    """Online too: the buffer, the dual variable and the optimiser's state go on where they were."""
    sections: dict[str, Any] = {"trainer": {"steps": 4}} | ({"sequence": PENDULUM} if online else {})
    whole = driver(job(tmp_path, name="whole", **sections))
    asyncio.run(whole.run())
    assert whole.finished and [step for step, _ in whole.parts.tracker.evals] == [0, 2, 4]
    config = job(tmp_path, name="halves", **sections)
    first = driver(config)
    train_step = first.parts.learners.train_step

    async def stops_in_the_second_step(played: Any) -> dict[str, float]:
        if first.step == 1:
            first.request_stop()
        return await train_step(played)

    first.parts.learners.train_step = stops_in_the_second_step  # type: ignore[method-assign]
    asyncio.run(first.run())
    assert first.step == 2 and not first.finished
    second = driver(config)
    asyncio.run(second.run(list_checkpoints(config.run_dir)[-1]))
    both = first.parts.tracker.steps | second.parts.tracker.steps
    assert without_clock(both) == without_clock(whole.parts.tracker.steps)
    for name, tensor in weights(whole.parts.learners.learner).items():
        assert torch.equal(weights(second.parts.learners.learner)[name], tensor), name
    if online:
        assert (
            whole.parts.workers.played == first.parts.workers.played + second.parts.workers.played and len(whole.parts.workers.played) == 3
        )
        assert both[4]["episode/actions_in_all"] == 3 * 3 * 10 and both[4]["buffer/trajectories"] == 12.0
    with pytest.raises(CheckpointError, match="run on other data"):
        asyncio.run(driver(config, data="other data").run(list_checkpoints(config.run_dir)[-1]))


def test_padding_counts_in_no_loss(tmp_path: Path) -> None:
    """Of imitation and entropy both; the published code averages the entropy over padding too."""
    for online in (False, True):
        config = job(tmp_path / str(online), sequence=(PENDULUM if online else {}) | {"dropout": 0.0}, learner={"updates_per_step": 1})
        learner = SequenceLearner(config)
        batch = sample(learner.recordings, learner._units, 8, 4, np.random.default_rng([config.seed, 0]))
        assert not batch.mask.all()
        with torch.no_grad():
            out = learner.network(batch)
            torch.manual_seed(5)
            spread = sum((learner.network.head.entropy(out[i : i + 4]) * batch.mask[i : i + 4]).sum() for i in (0, 4)) if online else 0.0
            expected = learner.network.head.loss(out, batch.actions)[batch.mask].mean()
        torch.manual_seed(5)
        metrics = learner.train_step([])
        if online:
            assert metrics["learner/imitation"] == pytest.approx(float(expected), rel=1e-4)
            assert metrics["learner/entropy"] == pytest.approx(float(spread) / float(batch.mask.sum()), rel=1e-4)
            assert metrics["learner/loss"] == pytest.approx(metrics["learner/imitation"] - 0.1 * metrics["learner/entropy"], rel=1e-4)
        else:
            assert metrics["learner/loss"] == pytest.approx(float(expected), rel=1e-4)


def test_an_update_does_not_depend_on_how_it_is_cut(tmp_path: Path) -> None:
    ended = []
    for tokens in (48, 10_000):
        learner = SequenceLearner(job(tmp_path, sequence={"dropout": 0.0}, learner={"tokens_per_microbatch": tokens}))
        assert len(learner._micro_batches(sample(learner.recordings, learner._units, 8, 4, np.random.default_rng(0)))) == (
            2 if tokens == 48 else 1
        )
        learner.train_step([])
        ended.append(weights(learner))
    for name, tensor in ended[0].items():
        torch.testing.assert_close(ended[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_the_dual_variable_holds_the_entropy_up() -> None:
    dual = Temperature(OnlineConfig(target=1.0, temperature_lr=0.1), choices=0, dims=3)
    assert dual.floor == -3.0 and dual.value == pytest.approx(0.1)
    assert Temperature(OnlineConfig(target=1.0), choices=4, dims=4).floor == 0.0
    dual.step(-4.0)
    assert dual.value == pytest.approx(0.1 * math.exp(0.1)), "Adam's first step: too little entropy, a higher price"
    for _ in range(5):
        dual.step(2.0)
    assert dual.value < 0.1
    twin = Temperature(OnlineConfig(target=1.0, temperature_lr=0.1), choices=0, dims=3)
    twin.load_state_dict(copy.deepcopy(dual.state_dict()))
    dual.step(0.0), twin.step(0.0)
    assert twin.value == dual.value


def test_what_was_played_is_learnt_by_what_it_achieved(tmp_path: Path) -> None:
    """Relabelling: the return asked for leaves no trace, returns to go are those of the rewards that came."""
    config = job(tmp_path, sequence=PENDULUM)
    learner, player = SequenceLearner(config), Player(config)
    assert learner._source() is learner.recordings
    learner.train_step([])
    player.load(learner.state_for_sync())
    played = player.play([1, 2, 3], target=1e6)
    learner.train_step([played])
    assert learner._source() is learner.buffer.recordings and len(learner.buffer.recordings) == 12  # type: ignore[union-attr]
    assert learner.buffer.recordings[-3:] == played  # type: ignore[union-attr]
    window = learner._units.window(played[0], 0, 4)
    assert window[2][0] == pytest.approx(played[0].total / 100, rel=1e-5)
    assert not np.array_equal(player.play([1, 2, 3], 0.0)[0].actions, played[0].actions), "what is asked for tells"
    assert np.array_equal(player.play([1, 2, 3], 1e6)[0].actions, played[0].actions), "the seeds fix what is drawn"


def test_a_target_is_lowered_by_what_was_earned_unless_rewards_are_delayed(tmp_path: Path) -> None:
    for late, asked in ((False, [-10.0, -11.0, -12.0]), (True, [-10.0] * 3)):
        config = job(tmp_path, sequence={"world": {"id": "CartPole-v1", "envs": 1}, "delayed": late, "context": 3, "targets": [-10.0]})
        player, seen = Player(config), []
        act = player.network.act

        def watched(windows: Any, _act: Any = act, _seen: list[Any] = seen, **options: Any) -> Any:
            _seen.append(windows.returns[0, -1].item())
            return _act(windows, **options)

        player.network.act = watched  # type: ignore[method-assign]
        player.evaluate([0], -10.0)
        assert seen[:3] == asked


@pytest.mark.parametrize("sections", [{}, {"sequence": PENDULUM}], ids=["choices", "squashed normal"])
def test_numbers_that_are_not_finite_stop_the_run_and_leave_the_weights(tmp_path: Path, sections: dict[str, Any]) -> None:
    learner = SequenceLearner(job(tmp_path, **sections))
    before = weights(learner)
    learner.recordings = [replace(r, states=np.full_like(r.states, np.nan)) for r in learner.recordings]
    with pytest.raises(NonFiniteError, match="update 0: the loss is not finite; .*update-000000-rank-00000.pt"):
        learner.train_step([])
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(learner).items())


def test_a_state_of_the_other_way_of_learning_is_refused(tmp_path: Path) -> None:
    offline, online = (SequenceLearner(job(tmp_path, sequence={"online": how})) for how in (None, PENDULUM["online"]))
    offline.save(tmp_path / "offline")
    online.save(tmp_path / "online")
    with pytest.raises(CheckpointError, match=r"was written without sequence\.online"):
        online.load(tmp_path / "offline")
    with pytest.raises(CheckpointError, match=r"was written with sequence\.online"):
        offline.load(tmp_path / "online")


def test_a_network_is_not_asked_for_what_it_cannot_do(tmp_path: Path) -> None:
    numbers = {**PENDULUM, "online": None, "time_embedding": True}
    SequenceLearner(job(tmp_path, sequence=numbers)).export(tmp_path / "model")
    for asked, message in (
        ({"world": {"id": "Pendulum-v1", "max_steps": 11}}, r"knows 10 time steps, an episode here has up to 11; lower"),
        ({"context": 8, "eval_context": 8}, r"sees 4 steps; lower sequence\.eval_context=8"),
        ({"sample": True}, r"sequence\.sample: .* says one action"),
    ):
        with pytest.raises((ModelError, ConfigError), match=message):
            make_player(job(tmp_path, sequence={**numbers, **asked}), tmp_path / "model")


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ({"return_scale": 10}, r"sequence\.return_scale was 1\.0 and is 10\.0 here; set them as they were"),
        ({"activation": "gelu_new"}, r"sequence\.activation was relu and is gelu_new here"),
        ({"heads": 4, "context": 2}, r"sequence\.context was 4 and is 2 here, sequence\.heads was 2 and is 4 here"),
        ({"world": {"id": "MountainCar-v0", "max_steps": 24}}, r"in another environment than MountainCar-v0: Interface\(state=4"),
        ({"world": {"id": "CartPole-v1", "max_steps": 30}}, r"knows 24 time steps, an episode here has up to 30; set sequence\.world"),
    ],
)
def test_a_network_of_other_settings_is_not_gone_on_with(tmp_path: Path, sequence: dict[str, Any], message: str) -> None:
    """Most leave every shape as it was; all are said by ``reasoner train`` before any actor starts."""
    world = {"world": {"id": "CartPole-v1", "max_steps": 24}}
    SequenceLearner(job(tmp_path, sequence=world)).export(tmp_path / "model")
    folder = tmp_path / "other" if "world" in sequence else tmp_path
    config = job(folder, sequence={**world, **sequence}, model={"path": str(tmp_path / "model")})
    for begin in (SequenceLearner, train):
        with pytest.raises(ModelError, match=message):
            begin(config)


def test_how_it_learns_may_change_and_what_was_not_saved_is_not_known(tmp_path: Path) -> None:
    SequenceLearner(job(tmp_path)).export(tmp_path / "model")
    path = {"path": str(tmp_path / "model")}
    other = {"dropout": 0.0, "batch": 4, "init_std": 0.1, "targets": [0.5], "keep_top": 0.5}
    SequenceLearner(job(tmp_path, sequence=other, model=path))
    about = tmp_path / "model" / ABOUT
    tree = json.loads(about.read_text())
    del tree["sequence"]["return_scale"]
    about.write_text(json.dumps(tree))
    SequenceLearner(job(tmp_path, sequence={"return_scale": 10}, model=path))


def test_rank_correlation_and_figures_by_hand() -> None:
    x, y = [0.0, 1.0, 2.0, 3.0], [0.1, 0.1, 0.5, 0.4]
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)

    def episodes(*returns: float) -> list[Episode]:
        return [Episode(env=i, total=r, steps=4, truncated=False) for i, r in enumerate(returns)]

    figures = evaluation({1.0: episodes(1.0, 0.0), 0.5: episodes(0.25, 0.25), 0.0: episodes(0.0, 0.0)})
    assert figures["eval/return"] == 0.5 and figures["eval/return_at_0.5"] == 0.25 and figures["eval/spearman"] == 1.0
    assert figures["eval/return_ci95"] == pytest.approx(1.96 * 0.5**0.5 / 2**0.5)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sequence": {"data": []}}, "sequence.data: kind sequence learns from Minari data sets"),
        ({"sequence": {"heads": 3}}, "sequence.heads: 3 does not divide sequence.width=16"),
        ({"sequence": {"eval_context": 9}}, "sequence.eval_context: more than sequence.context=4"),
        ({"sequence": {"online": {"target": 1.0}, "variant": "bc"}}, "sequence.online: it learns from returns"),
        ({"learner": {"zero_stage": 3}}, "learner.zero_stage: .* take 2 or below"),
        ({"learner": {"epochs": 2}}, "learner.epochs: windows are drawn at random"),
        ({"learner": {"ranks": 9}}, "sequence.batch: 8 windows cannot be shared by learner.ranks=9"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(tmp_path, **sections)


def test_a_job_takes_the_optimiser_of_the_papers_code(tmp_path: Path) -> None:
    learner = job(tmp_path, learner={"lr": 1e-4}).learner
    assert (learner.max_grad_norm, learner.weight_decay, learner.betas) == (0.25, 1e-4, (0.9, 0.999))
    assert derived_numbers(job(tmp_path))["optimiser steps in all"] == 6


def test_a_trained_model_is_evaluated_recorded_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job(tmp_path, sequence={"world": {"args": {}}})
    learner = SequenceLearner(config)
    learner.train_step([])
    learner.export(config.run_dir / "model")
    figures = evaluate(config)
    assert figures["eval/episodes"] == 3 and {"eval/return_at_1", "eval/return_at_0.5", "eval/spearman"} <= figures.keys()
    assert "asked for 1, return" in capsys.readouterr().out and (config.run_dir / "episode.gif").exists()
    player = Player(config)
    player.load(learner.state_for_sync())
    episodes = player.evaluate([FIRST_EVAL_SEED + i for i in range(3)], 1.0)
    assert sum(e.total for e in episodes) / 3 == figures["eval/return"]
    assert torch.equal(load_network(config.run_dir / "model").mean, learner.network.mean)
    own = {"policy": str(config.run_dir / "model"), "episodes": 2, "out": str(tmp_path / "own-v0")}
    assert collect(job(tmp_path, sequence={"collect": own}))["episodes"] == 2
    begun = SequenceLearner(job(tmp_path, model={"path": str(config.run_dir / "model")}, seed=9))
    assert all(torch.equal(weights(learner)[name], tensor) for name, tensor in weights(begun).items())
    with pytest.raises(ModelError, match="acts in another environment than CartPole-v1"):
        evaluate(job(tmp_path, sequence={"world": {"id": "CartPole-v1"}}))
    with pytest.raises(ModelError, match="holds no network of kind sequence"):
        evaluate(config, str(tmp_path))


@pytest.mark.slow
@pytest.mark.long
def test_players_and_ranks_as_actors(ray_cluster: Any, tmp_path: Path) -> None:
    """Two online steps through Ray and DeepSpeed, with the player killed between them: it is replaced and counted."""
    from reasoner_ray.agents.sequence.learner import SequenceLearners
    from reasoner_ray.agents.sequence.pool import PlayerPool

    config = job(tmp_path, sequence=PENDULUM, trainer={"steps": 2, "eval_every": 0, "checkpoint_every": 0})
    tracker: Any = FakeTracker()
    run = SequenceDriver(config, Parts(workers=PlayerPool(config), learners=SequenceLearners(config), tracker=tracker, data="x"))
    play = run.parts.workers.play

    async def killed_first(seeds: Sequence[int], target: float) -> list[Collected]:
        import ray

        ray.kill(run.parts.workers._actors[0])
        return await play(seeds, target)

    run.parts.workers.play = killed_first  # type: ignore[method-assign]

    async def go() -> dict[str, float]:
        try:
            return await run.run()
        finally:
            await run.stop()

    result = asyncio.run(go())
    assert run.finished and result["eval/episodes"] == 3
    assert tracker.steps[2]["faults/worker_restarts"] == 1.0 and tracker.steps[2]["episode/ended"] == 3.0
    assert load_network(config.run_dir / "model").interface.state == 3


@pytest.mark.long
@pytest.mark.slow
def test_collect_train_and_evaluate_from_the_command_line(tmp_path: Path) -> None:
    """The commands one after the other, on two ranks of ZeRO 1; the run is plotted."""
    config = job(tmp_path, learner={"ranks": 2, "zero_stage": 1, "cpus": 0.5})
    file = tmp_path / "job.yaml"
    file.write_text(to_yaml(config))
    out = f"sequence.collect.out={tmp_path / 'more-v0'}"
    for command in (["collect", file, out], ["train", file], ["eval", file], ["plot", config.run_dir, "--out", tmp_path / "curves.png"]):
        done = subprocess.run([sys.executable, "-m", "reasoner_ray.cli", *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        if command[0] == "collect":
            assert "episodes: 20" in done.stdout
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    assert (tmp_path / "curves.png").exists() and (config.run_dir / "episode.gif").exists()
