"""Engines and learners on nodes of their own: two raylets of one machine, told apart by custom resources."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from reasoner_ray.config import load_config
from reasoner_ray.doctor import Check
from reasoner_ray.errors import ConfigError, EnvironmentProblem
from reasoner_ray.sync.backends import part_of_memory
from reasoner_ray.trainer import launch
from reasoner_ray.trainer.launch import connect
from reasoner_ray.trainer.placement import check_resources, place
from tests.test_runs import Run, job

ROOT = Path(__file__).resolve().parents[1]
NODE_MEMORY = 200 * 2**20


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"engines": 1}, "object_store_memory": NODE_MEMORY})
    cluster.add_node(num_cpus=2, resources={"learners": 1}, object_store_memory=NODE_MEMORY)
    yield cluster
    cluster.shutdown()


@pytest.mark.long
def test_engines_and_learners_on_nodes_of_their_own(two_nodes: Cluster, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Ray places an actor only where its resources are, so the run can only end well with the two apart."""
    run = Run(
        job(tmp_path, tiny_model_dir, steps=2, checkpoint_every=0),
        f"cluster.address={two_nodes.address}",
        "cluster.rollout_resources={engines: 1}",
        "cluster.learner_resources={learners: 1}",
    )
    assert run.wait() == 0, run.log.read_text()[-3000:]
    assert run.steps == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "available", "message"),
    [
        (["rollout.tensor_parallel=2"], {"CPU": 8.0}, "rollout.tensor_parallel=2: the cluster has no GPUs"),
        (["rollout.workers=2", "rollout.tensor_parallel=4"], {"CPU": 8.0, "GPU": 8.0}, "need 9 GPUs; the cluster has 8"),
        (["learner.ranks=2", "learner.cpus=4"], {"CPU": 8.0}, "add up to 9 CPUs; the cluster has 8"),
        (["cluster.learner_resources={fast: 1}"], {"CPU": 8.0}, r"cluster\.learner_resources\.fast: 1 wanted, the cluster offers 0"),
    ],
)
def test_a_job_that_can_never_be_placed_is_refused(overrides: list[str], available: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_resources(load_config(None, overrides), available)


def test_models_of_steps_need_room_beside_engines() -> None:
    """On one GPU a search with a process reward model would wait for its actor."""
    options = ["rollout.episode=search_solutions", "search.method=mcts", "search.scorer={name: prm, args: {model: m}}"]
    search = load_config(None, options)
    with pytest.raises(ConfigError, match=r"need 2 GPUs with 1 for models that judge steps"):
        check_resources(search, {"CPU": 8.0, "GPU": 1.0}, training=False)
    check_resources(search, {"CPU": 8.0, "GPU": 2.0}, training=False)
    check_resources(load_config(None, [*options, "search.method=self_consistency"]), {"CPU": 8.0, "GPU": 1.0}, training=False)
    trained = load_config(None, [*options, "rollout.episode=search"])
    with pytest.raises(ConfigError, match=r"need 3 GPUs with 1 for models that judge steps"):
        check_resources(trained, {"CPU": 8.0, "GPU": 2.0})
    check_resources(trained, {"CPU": 8.0, "GPU": 1.0}, training=False)
    half = load_config(None, [*options, "search.scorer.args.gpus=0.5", "search.scorer.args.workers=4"])
    with pytest.raises(ConfigError, match=r"need 3 GPUs with 2 for models"):
        check_resources(half, {"CPU": 8.0, "GPU": 2.0}, training=False)
    rewarded = ["scoring.process={scorer: prm, args: {model: m}, separator: ' '}"]
    with pytest.raises(ConfigError, match=r"need 3 GPUs with 1 for models"):
        check_resources(load_config(None, rewarded), {"CPU": 8.0, "GPU": 2.0})


SEARCH = ["rollout.episode=search_solutions", "search.method=mcts", "search.scorer={name: prm, args: {model: m}}"]
REWARDED = ["scoring.process={scorer: prm, args: {model: m}, separator: ' '}"]


@pytest.mark.parametrize(
    ("overrides", "gpus", "training", "placed"),
    [
        ([], 1, True, {"rollout.gpus": 0.5, "learner.gpus": 0.5, "sync.backend": "ipc"}),
        (["sync.backend=ipc"], 8, True, {"rollout.gpus": 0.5, "learner.gpus": 0.5, "sync.backend": "ipc"}),
        (["sync.backend=object_store"], 1, True, {"rollout.gpus": 0.5, "learner.gpus": 0.5, "sync.backend": "object_store"}),
        (["rollout.engine=stepping"], 1, True, {"rollout.gpus": 0.5, "sync.backend": "object_store"}),
        (["rollout.workers=3"], 2, True, {"rollout.gpus": 0.5, "learner.gpus": 0.5, "sync.backend": "object_store"}),
        (["rollout.workers=2", "learner.ranks=2"], 2, True, {"rollout.gpus": 0.5, "learner.gpus": 0.5, "sync.backend": "ipc"}),
        (["rollout.gpus=0.7", "learner.gpus=0.3"], 1, True, {"rollout.gpus": 0.7, "learner.gpus": 0.3, "sync.backend": "ipc"}),
        (["rollout.gpus=0.7"], 2, True, {"rollout.gpus": 0.7, "learner.gpus": 0.3, "sync.backend": "ipc"}),
        (["learner.gpus=0.8"], 1, True, {"rollout.gpus": 0.2, "learner.gpus": 0.8, "sync.backend": "ipc"}),
        (SEARCH, 1, False, {"rollout.gpus": 0.5, "search.scorer.args": {"model": "m", "gpus": 0.5}}),
        ([*SEARCH, "search.scorer.args.gpus=0.2"], 1, False, {"rollout.gpus": 0.5, "search.scorer.args": {"model": "m", "gpus": 0.2}}),
        ([*SEARCH, "sync.backend=nccl"], 1, False, {"rollout.gpus": 0.5, "sync.backend": "object_store"}),
        (REWARDED, 1, True, {"rollout.gpus": 0.3333, "learner.gpus": 0.3333, "scoring.process.args": {"model": "m", "gpus": 0.3333}}),
        (REWARDED, 2, True, {"rollout.gpus": 0.5, "scoring.process.args": {"model": "m"}, "sync.backend": "ipc"}),
        ([], 2, True, {"rollout.gpus": None, "learner.gpus": None, "rollout.gpu_memory_utilization": None, "sync.backend": "auto"}),
        ([], 0, True, {"rollout.gpus": None, "sync.backend": "auto"}),
        (["kind=sft", "learner.critic=none"], 1, True, {"rollout.gpus": None, "learner.gpus": None}),
    ],
)
def test_actors_share_gpus_where_there_are_too_few(overrides: list[str], gpus: int, training: bool, placed: dict[str, object]) -> None:
    """What a job says itself stays; models of steps share only where the rest alone would not do."""
    config = place(load_config(None, overrides), {"CPU": 8.0, "GPU": float(gpus)}, training=training)
    assert {key: reduce(getattr, key.split("."), config) for key in placed} == placed


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        (["rollout.workers=4"], 1, "need 5 GPUs; the cluster has 1"),
        (["sync.backend=nccl"], 1, "need 2 GPUs; the cluster has 1"),
        (["rollout.tensor_parallel=2"], 1, "need 3 GPUs; the cluster has 1"),
        (["learner.ranks=3", "trainer.tasks_per_step=3"], 2, "need 4 GPUs; the cluster has 2"),
        (["learner.ranks=3", "trainer.tasks_per_step=3", "sync.backend=ipc"], 2, "need 3 GPUs; the cluster has 2"),
        (["learner.ranks=2", *REWARDED, "scoring.process.args.gpus=0.5"], 2, "need 3.5 GPUs with 0.5"),
        (["learner.ranks=2", "learner.gpus=0.5", "kind=sft", "learner.critic=none"], 1, "two ranks on one cannot be connected"),
        (["rollout.workers=2", "learner.ranks=2", "sync.backend=object_store"], 2, "need 4 GPUs; the cluster has 2"),
        (["rollout.gpus=1", "sync.backend=ipc", "learner.gpus=0.5"], 4, r"rollout\.gpus and learner\.gpus add up to 1\.5"),
    ],
)
def test_what_does_not_fit_even_so_is_refused(overrides: list[str], gpus: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(load_config(None, overrides), {"CPU": 8.0, "GPU": float(gpus)})


def test_no_actor_lies_on_two_gpus() -> None:
    """Three engines of 0.6 are less than two GPUs, and still only two of them fit."""
    config = load_config(None, ["rollout.workers=3", "rollout.gpus=0.6"])
    with pytest.raises(ConfigError, match=r"need 1\.8 GPUs; the cluster has 2"):
        check_resources(config, {"CPU": 8.0, "GPU": 2.0}, training=False)
    check_resources(config, {"CPU": 8.0, "GPU": 3.0}, training=False)


def test_an_engine_takes_memory_by_its_part_of_the_gpu() -> None:
    assert [part_of_memory(load_config(None, each)) for each in ([], ["rollout.gpus=0.5"], ["rollout.gpus=0.25"])] == [0.85, 0.4, 0.2]


def test_a_whole_group_of_gpus_is_no_part_of_one() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.gpus: an engine of rollout\.tensor_parallel=2 has whole GPUs"):
        load_config(None, ["rollout.tensor_parallel=2", "rollout.gpus=0.5"])


def test_an_evaluation_needs_no_room_for_learners() -> None:
    config = load_config(None, ["rollout.workers=2", "learner.ranks=4", "cluster.learner_resources={fast: 1}"])
    check_resources(config, {"CPU": 2.0, "GPU": 2.0}, training=False)
    with pytest.raises(ConfigError, match="add up to 2 CPUs; the cluster has 1"):
        check_resources(config, {"CPU": 1.0, "GPU": 2.0}, training=False)
    with pytest.raises(ConfigError, match=r"need 2 GPUs; the cluster has 1"):
        check_resources(config, {"CPU": 8.0, "GPU": 1.0}, training=False)


def test_a_machine_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before Ray starts, which would fail later and elsewhere."""
    lacking = Check("shared memory", "missing", "0.1 GB free in /dev/shm", "docker run --shm-size=8g")
    monkeypatch.setattr(launch, "check_shared_memory", lambda: lacking)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(EnvironmentProblem, match=r"shared memory .*: 0\.1 GB free in /dev/shm; docker run --shm-size=8g"):
        connect(load_config(None))


def test_a_local_cluster_that_does_not_come_up_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # Ray's own words and type

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fails)
    with pytest.raises(EnvironmentProblem, match=r"no local Ray cluster could be started: .* timed out .*reasoner doctor"):
        connect(load_config(None))


@pytest.mark.long
def test_a_local_cluster_starts_while_rays_usual_port_is_taken() -> None:
    program = (
        "import ray; from reasoner_ray.config import load_config; from reasoner_ray.trainer.launch import connect;"
        "connect(load_config(None)); print(ray.cluster_resources()['CPU'])"
    )
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # where another program has it, that is as good
            held.enter_context(socket.create_server(("", 6379)))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) >= 1


def test_an_address_that_does_not_answer() -> None:
    with pytest.raises(EnvironmentProblem, match=r"no Ray cluster answers at 127\.0\.0\.1:1.*ray start --head"):
        connect(load_config(None, ["cluster.address=127.0.0.1:1"]))
