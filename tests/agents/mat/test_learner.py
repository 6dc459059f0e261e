"""The learner: credit from segments, updates that do not depend on how they were cut, checkpoints, bad numbers. In this process."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reasoner_ray.agents.mat.learner import MatLearner, load_network, load_weights
from reasoner_ray.agents.mat.worker import RolloutWorker, Segment, join
from reasoner_ray.agents.weights import WEIGHTS
from reasoner_ray.config import JobConfig, derived_numbers, parse_config
from reasoner_ray.errors import ConfigError, ModelError, NonFiniteError
from tests.agents.mat.teams import team


def job(folder: Path, **sections: Any) -> JobConfig:
    """Two environments of the tests' world, a tiny network."""
    tree: dict[str, Any] = {
        "name": "run",
        "kind": "mat",
        "out": str(folder),
        "multi_agent": {"name": "tests.agents.mat.worlds:make_island", "args": {"length": 5}, "envs": 3, "segment_steps": 8},
        "mat": {"width": 8, "entropy": 0.01, "clip": 0.2},
        "rollout": {"cpus": 0, "torch_threads": 1},
        "learner": {"lr": 1e-2, "epochs": 2, "updates_per_step": 2, "torch_threads": 1, "cpus": 0},
        "trainer": {"steps": 3, "eval_every": 2, "eval_tasks": 3, "checkpoint_every": 1},
        "tracking": {"wandb": "off", "terminal": "plain"},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_config(tree)


def pair(config: JobConfig) -> tuple[MatLearner, RolloutWorker]:
    """A learner and a worker that has its weights."""
    worker = RolloutWorker(config, 0)
    learner = MatLearner(config, team=worker.team)
    worker.load(learner.state_for_sync())
    return learner, worker


def weights(learner: MatLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.state_for_sync()}


@pytest.mark.parametrize(
    ("order", "variant"),
    [("fixed", "mat"), ("fixed", "decoder_only"), ("fixed", "mat_dec"), ("shuffled", "mat"), ("shuffled", "decoder_only")],
)
def test_a_worker_s_segment_is_what_the_learner_recomputes(tmp_path: Path, order: str, variant: str) -> None:
    learner, worker = pair(job(tmp_path, mat={"order": order, "variant": variant}))
    segment, summary = worker.collect(0, fresh=True)
    before = weights(learner)
    metrics = learner.train_step([segment])
    assert metrics["mismatch/max_abs"] < 1e-5
    assert summary["lengths"] == [5, 5, 5] and summary["truncated"] == [True] * 3 and summary["steps"] == 24
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(learner).items())
    stale, _ = worker.collect(1, fresh=False)
    assert learner.train_step([stale])["mismatch/max_abs"] > 1e-4, "weights that did not arrive show"


def test_next_values_are_of_the_same_episode(tmp_path: Path) -> None:
    """Episodes of 5 steps in a segment of 8: at the fifth the next value is of the last view, not of the next episode's first."""
    _, worker = pair(job(tmp_path))
    segment, _ = worker.collect(0, fresh=True)
    going = ~(segment.terminated | segment.truncated)
    assert segment.truncated[4].all() and going[[0, 1, 2, 3, 5, 6, 7]].all()
    torch.testing.assert_close(segment.next_values[:4], segment.values[1:5])
    assert not torch.allclose(segment.next_values[4], segment.values[5], atol=1e-6)
    following, _ = worker.collect(1, fresh=False)
    torch.testing.assert_close(segment.next_values[7], following.values[0])
    last = segment.observations[4].clone()
    last[..., 0] = 5.0  # the time
    last[:, 2, :3] = 5.0
    torch.testing.assert_close(segment.next_values[4], worker.policy.values(last, segment.legal[4]))


def test_the_same_seed_collects_the_same_segment_and_every_worker_another(tmp_path: Path) -> None:
    config = job(tmp_path)
    learner, worker = pair(config)
    twin, other = RolloutWorker(config, 0), RolloutWorker(config, 1)
    for one in (twin, other):
        one.load(learner.state_for_sync())
    first, second, third = (w.collect(4, fresh=True)[0] for w in (worker, twin, other))
    assert torch.equal(first.actions, second.actions) and torch.equal(first.observations, second.observations)
    assert not torch.equal(first.observations, third.observations)


def test_an_update_does_not_depend_on_how_it_is_cut(tmp_path: Path) -> None:
    results = []
    for tokens in (1_000_000, 9):
        config = job(tmp_path, learner={"tokens_per_microbatch": tokens, "updates_per_step": 1, "epochs": 1})
        learner, worker = pair(config)
        metrics = learner.train_step([worker.collect(0, fresh=True)[0]])
        results.append((weights(learner), metrics))
    (whole, all_metrics), (cut, cut_metrics) = results
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, atol=1e-5, rtol=1e-4)
    for name in ("learner/policy_loss", "learner/value_loss", "learner/entropy", "learner/explained_variance"):
        assert cut_metrics[name] == pytest.approx(all_metrics[name], abs=1e-5), name


def test_agents_that_had_died_teach_nothing(tmp_path: Path) -> None:
    world = {"args": {"length": 8, "dies_at": 2}, "reward": "own"}
    config = job(tmp_path, multi_agent=world, learner={"epochs": 1, "updates_per_step": 1})
    learner, worker = pair(config)
    segment, _ = worker.collect(0, fresh=True)
    assert segment.active[:2].all() and not segment.active[2:, :, 2].any() and segment.active[:, :, :2].all()
    spoilt = replace(segment, rewards=segment.rewards.clone(), values=segment.values.clone())
    spoilt.rewards[2:, :, 2] += 1000.0  # what the dead earn
    spoilt.values[2:, :, 2] -= 7.0
    learner.train_step([segment])
    other, _ = pair(config)
    other.train_step([spoilt])
    for name, tensor in weights(learner).items():
        torch.testing.assert_close(weights(other)[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_dead_agent_s_values_are_trained_where_its_team_still_earns_for_it(tmp_path: Path) -> None:
    """Its targets bootstrap from them: only what nobody bootstraps from may be left out."""
    dies = {"args": {"length": 8, "dies_at": 2}}
    for reward, mask_value, left_out in (("mean", True, False), ("own", True, True), ("own", False, False)):
        learner, worker = pair(job(tmp_path, multi_agent=dies | {"reward": reward}, mat={"mask_value": mask_value}))
        segment, _ = worker.collect(0, fresh=True)
        data = learner._prepare(segment, 0)
        weights_ = data.value_weights.view(segment.active.shape)
        assert torch.equal(weights_ == 0, ~segment.active & left_out), (reward, mask_value)
        assert torch.equal(data.policy_weights.view(segment.active.shape) > 0, segment.active), "what the dead do is no policy"


def test_who_is_alive_next_is_said_of_the_same_episode(tmp_path: Path) -> None:
    _, worker = pair(job(tmp_path, multi_agent={"args": {"length": 5, "dies_at": 2}}))
    segment, _ = worker.collect(0, fresh=True)
    c = 2
    assert segment.active[:, 0, c].tolist() == [True, True, False, False, False, True, True, False]
    assert segment.next_active[:, 0, c].tolist() == [True, False, False, False, False, True, False, False]
    assert segment.next_active[:, 0, :c].all(), "those that time cuts off are alive until then"


def test_a_saved_learner_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = job(tmp_path)
    learner, worker = pair(config)
    segments = [worker.collect(step, fresh=step == 0)[0] for step in range(3)]
    learner.train_step([segments[0]])
    learner.save(tmp_path / "state")
    after = [learner.train_step([s]) for s in segments[1:]]
    twin = MatLearner(config, team=worker.team)
    twin.load(tmp_path / "state")
    again = [twin.train_step([s]) for s in segments[1:]]
    for a, b in zip(after, again, strict=True):
        assert {k: v for k, v in a.items() if "second" not in k and "per_s" not in k} == {
            k: v for k, v in b.items() if "second" not in k and "per_s" not in k
        }
    for name, tensor in weights(learner).items():
        assert torch.equal(weights(twin)[name], tensor), name


def test_numbers_that_are_not_finite_stop_the_run_and_leave_the_weights(tmp_path: Path) -> None:
    learner, worker = pair(job(tmp_path))
    segment, _ = worker.collect(0, fresh=True)
    before = weights(learner)
    spoilt = replace(segment, logprobs=torch.full_like(segment.logprobs, math.nan))
    with pytest.raises(NonFiniteError, match=r"update 0: the loss is not finite; .*nonfinite/update-000000-rank-00000\.pt"):
        learner.train_step([spoilt])
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(learner).items())
    assert torch.load(tmp_path / "run" / "nonfinite" / "update-000000-rank-00000.pt")["rows"][0]["logprobs"].isnan().all()


def test_a_trained_network_is_written_and_read(tmp_path: Path) -> None:
    learner, worker = pair(job(tmp_path))
    learner.train_step([worker.collect(0, fresh=True)[0]])
    worker.load(learner.state_for_sync())
    learner.export(tmp_path / "model")
    network, there = load_network(tmp_path / "model")
    assert there == worker.team
    view = worker._teams.begin([0, 1, 2])
    seen = torch.from_numpy(view.observations), torch.from_numpy(view.legal)
    assert torch.equal(network.act(*seen, greedy=True).actions, worker.policy.act(*seen, greedy=True).actions)
    begun = MatLearner(job(tmp_path, model={"path": str(tmp_path / "model")}, seed=9), team=worker.team)
    assert all(torch.equal(weights(learner)[name], tensor) for name, tensor in weights(begun).items())
    assert begun.value_norms[0].moments == learner.value_norms[0].moments != (0.0, 1.0), "values stay in the units they were learnt in"
    with pytest.raises(ModelError, match=r"3 choices and 2 dimensions there; observations of 6 numbers, actions of 3 choices and 0 dim"):
        load_weights(network, tmp_path / "model", team("discrete"))
    with pytest.raises(ModelError, match="holds no network of kind mat"):
        load_network(tmp_path)
    wider = job(tmp_path, model={"path": str(tmp_path / "model")}, mat={"width": 16})
    with pytest.raises(ModelError, match=r"mat\.width was 8 and is 16 here"):
        MatLearner(wider, team=worker.team)
    cut = load_file(tmp_path / "model" / WEIGHTS)
    save_file(dict(list(cut.items())[1:]), tmp_path / "model" / WEIGHTS)
    with pytest.raises(ModelError, match="the weights do not fit"):
        load_network(tmp_path / "model")


def test_segments_join_along_their_environments(tmp_path: Path) -> None:
    _, worker = pair(job(tmp_path))
    segment, _ = worker.collect(0, fresh=True)
    both: Segment = join([segment, segment])
    assert both.rows == 48 and both.actions.shape[:2] == (8, 6)


def test_a_job_begins_with_new_weights_and_the_optimiser_of_the_papers_code(tmp_path: Path) -> None:
    config = job(tmp_path)
    assert (config.model.path, config.learner.adam_eps, config.learner.betas) == ("scratch", 1e-5, (0.9, 0.999))
    assert job(tmp_path, learner={"adam_eps": 1e-8}).learner.adam_eps == 1e-8
    assert derived_numbers(config)["environment steps in all"] == 3 * 3 * 8


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mat": {"heads": 3}}, r"mat\.heads: 3 does not divide mat\.width=8"),
        ({"learner": {"zero_stage": 3}}, r"learner\.zero_stage: .* take 2 or below"),
        ({"mat": {"order": "shuffled", "variant": "mat_dec"}}, r"mat\.order: .* mat\.variant=mat_dec act all at once"),
        ({"mat": {"order": "shuffled", "variant": "encoder_only"}}, r"mat\.order: .* mat\.variant=encoder_only act all at once"),
        ({"trainer": {"max_staleness": 1}}, r"trainer\.max_staleness: .* set it to 0"),
        ({"trainer": {"max_mismatch_k3": 0.1}}, r"trainer\.max_mismatch_k3: .* set it to null"),
        ({"sync": {"backend": "nccl"}}, r"sync\.backend: nccl moves weights between GPUs"),
        ({"learner": {"updates_per_step": 100}}, r"learner\.updates_per_step: 24 environment steps cannot be shared by 100 updates"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(tmp_path, **sections)
