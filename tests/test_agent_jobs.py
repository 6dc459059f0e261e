"""The laptop's jobs of agents whose environments need packages or processes of their own, for two steps with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parent.parent / "jobs" / "agents"
SMALL = ["trainer.steps=2", "trainer.tasks_per_step=4", "trainer.eval_tasks=1", "trainer.eval_every=0", "rollout.max_turns=3"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("job", "package", "own"),
    [
        ("textworld", "textworld", ["rollout.max_context=768"]),
        ("data_science", "sklearn", ["rollout.max_context=768", "rollout.max_new_tokens=16"]),
        ("credit_chain_etpo", "gymnasium", []),
    ],
)
def test_a_job_trains_from_end_to_end(job: str, package: str, own: list[str], tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip(package)
    options = [f"model.path={tiny_model_dir}", "model.dtype=float32", "name=run", f"out={tmp_path}", "tracking.wandb=off", *SMALL, *own]
    command = [sys.executable, "-m", "reasoner_ray.cli", "train", str(JOBS / f"{job}.yaml"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "episode/turns" in r]
    assert [r["step"] for r in steps] == [1, 2]
    for r in steps:
        assert r["learner/tokens_trained"] > 0 and 1 <= r["episode/turns"] <= 3 and 0 <= r["episode/success"] <= 1
        assert not [name for name in r if name.startswith("faults/environment")], "an environment failed"
        if job == "data_science":
            assert r["episode/return"] == pytest.approx(-r["episode/turns"]), "a tiny random model writes no program: -1 a try"


@pytest.mark.long
def test_scored_episodes_are_recorded_learnt_and_asked_for(tiny_model_dir: Path, tmp_path: Path) -> None:
    data, rl = tmp_path / "episodes.jsonl", JOBS / "tomato_salad.yaml"
    same = ["model.dtype=float32", f"out={tmp_path}", "tracking.wandb=off", "rollout.max_turns=4"]

    def reasoner(command: str, job: Path, *options: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "reasoner_ray.cli", command, str(job), *same, *options]
        return subprocess.run(line, capture_output=True, text=True, timeout=560)

    collect = [f"model.path={tiny_model_dir}", f"rollout.collect.out={data}", "rollout.collect.tasks=3", "trainer.samples_per_task=2"]
    done = reasoner("collect", rl, *collect)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    records = [json.loads(line) for line in data.read_text().splitlines()]
    assert "episodes: 6\n" in done.stdout and len(records) == 24 and len({r["id"] for r in records}) == 24
    assert all(0 < r["start"] < len(r["tokens"]) == r["ends"][-1] for r in records)
    assert reasoner("collect", rl, *collect).returncode == 1, "what is there is not written over"

    taught = JOBS / "tomato_salad_conditioned.yaml"
    learn = [f"supervised.data=[{data}]", "supervised.batch=8", "supervised.max_steps=2", "trainer.eval_samples=2", "name=run"]
    done = reasoner("train", taught, f"model.path={tiny_model_dir}", *learn)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    done = reasoner("eval", taught, "trainer.eval_samples=2", f"model.path={tmp_path / 'run' / 'model'}")
    assert done.returncode == 0 and "eval/discounted_return" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
