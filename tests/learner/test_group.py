"""Learner ranks as Ray actors: two ranks do what one does, at every ZeRO stage; a killed rank is reported and replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reasoner_ray.config import JobConfig
from reasoner_ray.errors import CheckpointError, EnvironmentProblem, LearnerLost, NonFiniteError
from reasoner_ray.learner.group import LearnerGroup, share_groups
from reasoner_ray.learner.learner import Learner
from reasoner_ray.learner.model import policy_state
from reasoner_ray.learner.predict import predict
from reasoner_ray.prm.examples import Kind
from reasoner_ray.sync.buckets import unpack_bucket
from reasoner_ray.trajectory import Trajectory
from tests.prm.conftest import make_examples

pytestmark = pytest.mark.slow
Groups = list[list[Trajectory]]
ALGORITHM = {"name": "poad"}
SMALL = {"lr": 1e-4, "critic_lr": 1e-4, "tokens_per_microbatch": 40}


def after_two_steps(config: JobConfig, groups: Groups, rank: int, world_size: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Trained weights (float32) and last metrics of a new learner in this process; each rank takes its share of the groups."""
    learner = Learner(config, rank, world_size)
    for _ in range(2):
        metrics = learner.train_step(share_groups(groups, world_size, config.learner.updates_per_step)[rank])
    return {n: t.clone() for n, t in policy_state(learner.engine.policy, learner.engine.gathered)}, metrics


def on_rank(learner: Learner, config: JobConfig, groups: Groups) -> Any:
    return after_two_steps(config, groups, learner.engine.rank, learner.engine.world_size)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def pair_config(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    from reasoner_ray.config import parse_config

    return parse_config(
        {
            "out": str(tmp_path_factory.mktemp("runs")),
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "algorithm": ALGORITHM,
            "trainer": {"tasks_per_step": 4, "samples_per_task": 4},
            "learner": {"ranks": 2, "zero_stage": 3, "critic_hidden": [32], "torch_threads": 1, "collective_timeout_s": 60, **SMALL},
            "sync": {"bucket_mb": 1},
        }
    )


@pytest.fixture(scope="module")
def pair(ray_cluster: Any, loop: asyncio.AbstractEventLoop, pair_config: JobConfig) -> Iterator[LearnerGroup]:
    """Two ranks at ZeRO 3."""
    ray_cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    group = LearnerGroup(pair_config)
    loop.run_until_complete(group.start())
    yield group
    loop.run_until_complete(group.stop())


def test_share_groups() -> None:
    assert share_groups(list("abcdefgh"), ranks=2, updates=2) == [list("aceg"), list("bdfh")]
    assert share_groups(list("abcdefgh"), ranks=4, updates=2) == [list("ae"), list("bf"), list("cg"), list("dh")]
    with pytest.raises(ValueError, match="3 groups"):
        share_groups(list("abc"), ranks=2, updates=1)


def test_a_meeting_point_whose_port_is_taken() -> None:
    from reasoner_ray.learner.engine import open_store

    with socket.create_server(("", 0)) as occupied:
        port = occupied.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=rf"meeting point at 127\.0\.0\.1:{port}: .*EADDRINUSE.*--node-ip-address"):
            open_store("127.0.0.1", 2, timeout_s=1, port=port)
    assert open_store("127.0.0.1", 2, timeout_s=5).port > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("updates", [1, 2])
def test_two_ranks_equal_one(
    stage: int,
    updates: int,
    pair: LearnerGroup,
    loop: asyncio.AbstractEventLoop,
    job: Callable[..., JobConfig],
    groups: Groups,
    tiny_model_dir: Path,
) -> None:
    """Uneven micro-batches included: 40 packed tokens a row, and trajectories of different lengths on both ranks.

    Weights are compared a tensor at a time, relative to what training changed: Adam turns the rounding of a gradient
    that is all but zero into a good part of a step, so single elements say nothing.
    """
    config = job(algorithm=ALGORITHM, learner={**SMALL, "ranks": 2, "zero_stage": stage, "updates_per_step": updates})
    expected = after_two_steps(
        job(algorithm=ALGORITHM, learner={**SMALL, "tokens_per_microbatch": 4096, "updates_per_step": updates}), groups, 0, 1
    )
    results = loop.run_until_complete(pair.run(on_rank, config, groups))
    compare(results, expected, tiny_model_dir, of_change=1e-3, of_metrics=1e-4)


def test_two_ranks_equal_one_in_bfloat16(
    pair: LearnerGroup, loop: asyncio.AbstractEventLoop, job: Callable[..., JobConfig], groups: Groups, tiny_model_dir: Path
) -> None:
    """As large models are trained: ZeRO 3, gradient checkpointing, a shared critic. A sum in another order is another bfloat16."""
    how = {**SMALL, "gradient_checkpointing": True, "critic": "shared"}
    common: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "algorithm": ALGORITHM}
    expected = after_two_steps(job(**common, learner={**how, "tokens_per_microbatch": 4096}), groups, 0, 1)
    config = job(**common, learner={**how, "ranks": 2, "zero_stage": 3})
    compare(loop.run_until_complete(pair.run(on_rank, config, groups)), expected, tiny_model_dir, of_change=0.2, of_metrics=0.02)


def supervised_on_rank(learner: Learner, config: JobConfig, groups: Groups) -> Any:
    """Weights and metrics after two steps of a supervised kind, and what this rank then says of its share of all trajectories."""
    rank, world_size = learner.engine.rank, learner.engine.world_size
    made = Learner(config, rank, world_size)
    for _ in range(2):
        metrics = made.train_step([groups[rank]] if world_size > 1 else groups)
    weights = {n: t.clone() for n, t in policy_state(made.engine.policy, made.engine.gathered)}
    return weights, metrics, predict(made, [t for group in groups for t in group])


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", ["sft", "prm", "value"])
def test_two_ranks_are_taught_as_one(
    kind: Kind, stage: int, pair: LearnerGroup, loop: asyncio.AbstractEventLoop, job: Callable[..., JobConfig], tiny_model_dir: Path
) -> None:
    """Shares of five and two solutions, rows of 30 tokens: denominators are those of the whole batch.

    Rows are summed in another order; with this epsilon AdamW does not make whole steps of what rounding leaves where a gradient is 0.
    """
    from transformers import AutoModelForCausalLM

    settings = {
        **SMALL,
        "adam_eps": 1e-6,
        "critic_hidden": [32],
        "critic": "none" if kind == "sft" else "joint",
        "tokens_per_microbatch": 30,
    }
    alone = job(kind=kind, learner={**settings, "tokens_per_microbatch": 4096})
    shared = job(kind=kind, learner={**settings, "ranks": 2, "zero_stage": stage})
    rows = [e.trajectory(kind, alone.supervised) for e in make_examples(7)]
    groups = [rows[:5], rows[5:]]
    expected, expected_metrics, (places, said) = supervised_on_rank(Learner(alone), alone, groups)
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).state_dict()
    results = loop.run_until_complete(pair.run(supervised_on_rank, shared, groups))
    for weights, metrics, _ in results:
        for name, value in expected.items():
            assert (weights[name] - value).norm() <= 1e-3 * (value - start[name]).norm(), name
        for key in ("learner/loss", "learner/grad_norm", "learner/tokens_trained"):
            assert metrics[key] == pytest.approx(expected_metrics[key], rel=1e-4), key
    together = torch.full((len(said),), float("nan"))
    for _, _, (own, values) in results:
        together[own] = values
    torch.testing.assert_close(together[places], said, atol=1e-4, rtol=1e-3)


def compare(results: Any, alone: Any, start_dir: Path, *, of_change: float, of_metrics: float) -> None:
    """Weights within ``of_change`` of what training changed, a tensor at a time; metrics within ``of_metrics``, relative."""
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(start_dir, dtype=torch.float32).state_dict()
    expected, expected_metrics = alone
    for weights, metrics in results:
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            assert (weights[name] - value).norm() <= of_change * (value - start[name]).norm(), name
        for key in (
            "learner/grad_norm",
            "learner/loss",
            "learner/entropy",
            "learner/explained_variance",
            "mismatch/k3",
            "mismatch/max_abs",
        ):
            assert metrics[key] == pytest.approx(expected_metrics[key], abs=0.1 * of_metrics, rel=of_metrics), key
        assert metrics["learner/tokens_trained"] == expected_metrics["learner/tokens_trained"]


def test_published_weights_and_export(
    pair: LearnerGroup, loop: asyncio.AbstractEventLoop, ray_cluster: Any, groups: Groups, tmp_path: Path, tiny_model_dir: Path
) -> None:
    from transformers import AutoModelForCausalLM

    refs = [ray_cluster.put(group) for group in groups]
    metrics = loop.run_until_complete(pair.train_step(refs))
    assert metrics["learner/tokens_trained"] == sum(t.trainable_tokens for group in groups for t in group)
    published = [named for ref in loop.run_until_complete(pair.publish_weights()) for named in unpack_bucket(ray_cluster.get(ref))]
    loop.run_until_complete(pair.export(tmp_path / "hf"))
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").named_parameters())
    original = dict(AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters())
    assert {name for name, _ in published} == exported.keys() == original.keys()
    for name, tensor in published:
        assert torch.equal(tensor, exported[name])
        assert not torch.equal(tensor, original[name])
    mismatch = loop.run_until_complete(pair.mismatch(refs[0]))
    assert mismatch["mean_abs"] > 0 and mismatch["tokens"] == sum(t.trainable_tokens for t in groups[0])


def test_errors_keep_their_kind(
    pair: LearnerGroup, loop: asyncio.AbstractEventLoop, ray_cluster: Any, groups: Groups, tmp_path: Path
) -> None:
    """What a rank raises reaches the driver as itself, from whichever rank, and the ranks stay in step."""
    bad = [list(group) for group in groups]
    bad[1][0] = bad[1][0].with_outcome(float("inf"))  # the second rank's share
    with pytest.raises(NonFiniteError, match="nonfinite"):
        loop.run_until_complete(pair.train_step([ray_cluster.put(group) for group in bad]))
    with pytest.raises(CheckpointError, match="corrupt"):
        loop.run_until_complete(pair.load(tmp_path / "nothing"))
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "rank-00001.pt").symlink_to("/dev/full")
    with pytest.raises(OSError):
        loop.run_until_complete(pair.save(folder))
    loop.run_until_complete(pair.publish_weights())


def test_killed_rank_is_reported_and_replaced(
    pair: LearnerGroup, loop: asyncio.AbstractEventLoop, ray_cluster: Any, groups: Groups, tmp_path: Path
) -> None:
    """SIGKILL in mid-step: ``LearnerLost`` at the driver; after restart and load the step gives the same weights."""
    refs = [ray_cluster.put(group) for group in groups]

    def weights() -> dict[str, torch.Tensor]:
        published = loop.run_until_complete(pair.publish_weights())
        return {name: tensor.clone() for ref in published for name, tensor in unpack_bucket(ray_cluster.get(ref))}

    loop.run_until_complete(pair.save(tmp_path))
    loop.run_until_complete(pair.train_step(refs))
    expected = weights()

    async def step_and_kill() -> None:
        (_, _, process) = (await pair._call("place"))[1]
        os.kill(process, signal.SIGSTOP)  # however fast the machine, the other rank is now in mid-step, waiting for this one
        step = asyncio.ensure_future(pair.train_step(refs))
        await asyncio.sleep(0.5)
        assert not step.done()
        os.kill(process, signal.SIGKILL)
        await step

    with pytest.raises(LearnerLost, match="died during train_step"):
        loop.run_until_complete(asyncio.wait_for(step_and_kill(), timeout=60))
    with pytest.raises(LearnerLost):
        loop.run_until_complete(pair.train_step(refs))
    loop.run_until_complete(pair.restart())
    loop.run_until_complete(pair.load(tmp_path))
    loop.run_until_complete(pair.train_step(refs))
    assert all(torch.equal(value, expected[name]) for name, value in weights().items())


def test_no_room_in_the_cluster(ray_cluster: Any, loop: asyncio.AbstractEventLoop, pair_config: JobConfig) -> None:
    learner = pair_config.learner.model_copy(update={"cpus": 1000.0, "collective_timeout_s": 3.0})
    group = LearnerGroup(pair_config.model_copy(update={"learner": learner}))
    with pytest.raises(EnvironmentProblem, match="the cluster has"):
        loop.run_until_complete(group.start())
    loop.run_until_complete(group.stop())
