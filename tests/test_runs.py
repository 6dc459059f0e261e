"""Whole runs through the command line: real Ray, real vLLM, real DeepSpeed, a tiny model; with kills and resumes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.processes import left_behind

STEPS = 8
REWARD = """
def spread(answer, item):
    return (sum(map(ord, answer)) % 7) / 6  # a tiny random model never solves a sum; this gives it something to learn
"""


def job(folder: Path, model: Path, **trainer: Any) -> Path:
    """A job small enough for a test: two prompts, four samples each, a tiny model in float32."""
    tree = {
        "name": "run",
        "out": str(folder),
        "model": {"path": str(model), "dtype": "float32"},
        "task": {"name": "arithmetic", "args": {"digits": 1, "shots": 1}},
        "scoring": {"scorers": [{"name": "reward_of_the_test:spread"}]},
        "rollout": {"max_new_tokens": 4, "max_context": 64, "kv_cache_gb": 0.1, "cpus": 0},
        "algorithm": {"name": "poad"},
        "learner": {"lr": 1e-3, "cpus": 0, "critic_hidden": [16]},
        "trainer": {"steps": STEPS, "tasks_per_step": 2, "samples_per_task": 4, "eval_tasks": 4, "checkpoint_every": 1, **trainer},
        "tracking": {"wandb": "off", "terminal": "plain"},
    }
    path = folder / "job.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    (folder / "reward_of_the_test.py").write_text(REWARD)
    return path


class Run:
    """``reasoner train`` as a process of its own, which a test can watch and hurt."""

    def __init__(self, job_file: Path, *options: str) -> None:
        self.folder = job_file.parent / "run"
        self.log = job_file.parent / "output.txt"
        command = [sys.executable, "-m", "reasoner_ray.cli", "train", str(job_file), *options]
        self.environment = {**os.environ, "PYTHONPATH": f"{job_file.parent}:{Path(__file__).parent.parent}"}
        self.process = subprocess.Popen(
            command, stdout=self.log.open("a"), stderr=subprocess.STDOUT, start_new_session=True, env=self.environment
        )

    @property
    def steps(self) -> list[int]:
        """Steps recorded so far."""
        return [record["step"] for record in self.records]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Their metrics."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}") and "reward/mean" in line]

    @property
    def groups(self) -> list[int]:
        """Groups trained on so far, in the order of training."""
        return [json.loads(line)["group"] for line in (self.folder / "groups.jsonl").read_text().splitlines()]

    @property
    def family(self) -> list[psutil.Process]:
        """Every process that the run has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait, but not for a process that has ended."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the run ended early:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"waited {seconds} s in vain:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    def wait(self, seconds: float = 180) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    def actors(self, name: str) -> list[psutil.Process]:
        """Ray's processes of one actor class, of this run alone."""
        found = []
        for process in self.family:
            try:
                if process.name().startswith("ray::") and name in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def kill_actor(self, name: str) -> None:
        """SIGKILL one actor, as the kernel does where memory runs out."""
        self.wait_for(lambda: bool(self.actors(name)))
        self.actors(name)[0].send_signal(signal.SIGKILL)


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*args: Any) -> Run:
        runs.append(Run(*args))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Run:
    """An uninterrupted run, which others are compared with."""
    run = Run(job(tmp_path_factory.mktemp("straight"), tiny_model_dir))
    assert run.wait() == 0, run.log.read_text()[-3000:]
    return run


def weights(run: Run) -> dict[str, Any]:
    return load_file(run.folder / "model/model.safetensors")


def assert_equal_weights(a: Run, b: Run) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    different = [name for name in left if not left[name].equal(right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ"


def test_a_run_trains_tracks_and_exports(straight: Run, tiny_model_dir: Path) -> None:
    records = [json.loads(line) for line in (straight.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "reward/mean" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert max(r["mismatch/max_abs"] for r in steps) < 1e-3, "float32 rollout and learner agree after every sync"
    assert all(r["staleness/max"] == 0 for r in steps)
    assert all(r["learner/grad_norm"] > 0 for r in steps)
    model = AutoModelForCausalLM.from_pretrained(straight.folder / "model")
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    assert any(not value.equal(before[name]) for name, value in model.state_dict().items()), "training changed the weights"
    assert (straight.folder / "samples.jsonl").read_text().count('"answer"') >= STEPS


@pytest.mark.long
def test_evaluating_the_exported_model_gives_the_runs_last_accuracy(straight: Run) -> None:
    folder = straight.folder
    command = [sys.executable, "-m", "reasoner_ray.cli", "eval", str(folder / "config.yaml"), f"--model={folder / 'model'}"]
    done = subprocess.run(command, env=straight.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {name: float(value) for name, value in (line.split(": ") for line in done.stdout.splitlines())}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if "eval/accuracy" in r][-1]
    assert last["step"] == STEPS
    for name in ("eval/accuracy", "eval/answers", "eval/failed", "eval/tokens_mean"):
        assert found[name] == pytest.approx(last[name], rel=1e-3), name  # four digits are printed


@pytest.mark.long
def test_a_driver_killed_twice_resumes_to_bit_equal_weights(
    straight: Run, tmp_path: Path, tiny_model_dir: Path, start: Callable[..., Run]
) -> None:
    """At random points of a step: while it collects, learns, syncs or writes its checkpoint, as it comes."""
    file, source = job(tmp_path, tiny_model_dir), random.Random(7)
    run = start(file)
    for known in (1, 3):
        before = max(known, len(run.steps))
        run.wait_for(lambda r=run, n=before: len(r.steps) > n)  # type: ignore[misc]
        time.sleep(source.random() * run.records[-1]["time/step_s"])
        assert run.process.poll() is None, "the run was over before it was killed"
        family = [p for p in run.family if "Agent" not in p.name()]  # Ray's two give up by themselves, but only after a minute
        run.process.send_signal(signal.SIGKILL)
        run.wait()
        assert not left_behind(family)
        run = start(file, "--resume")
    assert run.wait() == 0, run.log.read_text()[-3000:]
    assert run.steps == list(range(1, STEPS + 1))
    assert run.groups == list(range(2 * STEPS))
    assert_equal_weights(straight, run)


def test_ctrl_c_checkpoints_and_resumes_to_bit_equal_weights(
    straight: Run, tmp_path: Path, tiny_model_dir: Path, start: Callable[..., Run]
) -> None:
    file = job(tmp_path, tiny_model_dir, checkpoint_every=0)
    first = start(file)
    first.wait_for(lambda: len(first.steps) >= 3)
    family = first.family
    asked = time.monotonic()
    os.killpg(first.process.pid, signal.SIGINT)
    assert first.wait(60) == 130
    assert time.monotonic() - asked < 30
    assert not left_behind(family)
    assert "Traceback" not in first.log.read_text()
    assert list((first.folder / "checkpoints").glob("step-*/MANIFEST.json"))
    second = start(file, "--resume")
    assert second.wait() == 0, second.log.read_text()[-3000:]
    assert_equal_weights(straight, second)


@pytest.mark.long
def test_every_kind_of_actor_killed_twice(tmp_path: Path, tiny_model_dir: Path, start: Callable[..., Run]) -> None:
    steps = 12
    run = start(job(tmp_path, tiny_model_dir, steps=steps))
    for number, name in enumerate(["RolloutActor", "ScorerWorker", "LearnerRank"] * 2):
        run.wait_for(lambda n=number: len(run.steps) > n)  # type: ignore[misc]
        run.kill_actor(name)
        time.sleep(0.5)
    assert run.wait(240) == 0, run.log.read_text()[-4000:]
    assert run.steps == list(range(1, steps + 1))
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["faults/learner_restarts"] == 2
    assert last["faults/engine_restarts"] == 2
    assert last["faults/groups_failed"] == 0
    assert sorted(run.groups) == list(range(2 * steps)), "every admitted group was trained on, none of them twice"
