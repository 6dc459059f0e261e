"""PPO with process rewards, from labels to the gradient: a model of steps is trained, then it rewards a policy beside the outcome."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from reasoner_ray.config import JobConfig
from reasoner_ray.learner.learner import Learner
from tests.prm.conftest import make_examples
from tests.test_runs import Run
from tests.test_runs import job as rl_job

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_a_policy_learns_from_process_rewards(tmp_path: Path, tiny_model_dir: Path, job: Callable[..., JobConfig]) -> None:
    """Real engine, actors and learner: scores reach the tokens, their figures the record, and a killed actor is replaced."""
    config = job("prm")
    learner = Learner(config)
    for step in range(5):
        learner.train_step([[e.trajectory("prm", config.supervised) for e in make_examples(16, seed=step)]])
    learner.export(tmp_path / "prm")

    file = rl_job(tmp_path / "rl", tiny_model_dir, steps=4)
    tree = yaml.safe_load(file.read_text())
    tree["rollout"] |= {"stop": ["never"], "max_new_tokens": 8}
    process = {"args": {"model": str(tmp_path / "prm"), "dtype": "float32", "threads": 1}, "separator": "e", "weight": 0.5}
    tree["scoring"]["process"] = process
    file.write_text(yaml.safe_dump(tree))
    run = Run(file)
    run.wait_for(lambda: len(run.steps) > 0, seconds=200)
    run.kill_actor("StepModelActor")
    assert run.wait(200) == 0, run.log.read_text()[-3000:]
    records = run.records
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    for record in records:
        assert 0 < record["process/score"] < 1 and record["process/steps"] >= 1
        total = record["reward/reward_of_the_test:spread"] + record["process/reward"]
        assert record["reward/mean"] == pytest.approx(total, abs=1e-4), "the outcome and the weighted process add up"
        assert record["mismatch/max_abs"] < 1e-3
    assert max(record["process/steps"] for record in records) > 1, "answers were cut into steps"
    assert all(record["faults/groups_failed"] == 0 for record in records)
