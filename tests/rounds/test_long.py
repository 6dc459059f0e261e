"""Rounds from the command line through the real parts on the tiny model: killed in their midst, resumed, and read by `reasoner plot`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from reasoner_ray.cli import app
from reasoner_ray.config import JobConfig
from reasoner_ray.learner.learner import Learner
from reasoner_ray.prm.examples import read_examples
from reasoner_ray.prm.settings import SupervisedConfig
from reasoner_ray.trainer.metrics_log import read_jsonl
from tests.labels.test_run import ENDS
from tests.labels.test_run import start as start_command
from tests.prm.conftest import job as supervised_job  # noqa: F401 - a fixture
from tests.prm.conftest import make_examples

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]  # twenty starts of Ray


def write_job(folder: Path, model: Path, **sections: Any) -> Path:
    """Every third answer counts as right, so a random model finds some."""
    tree: dict[str, Any] = {
        "name": "loop",
        "kind": "rounds",
        "out": str(folder),
        "model": {"path": str(model), "dtype": "float32"},
        "task": {"name": "arithmetic", "args": {"digits": 1, "shots": 1}},
        "scoring": {"scorers": [{"name": "tests.labels.scorers:sometimes"}]},
        "rollout": {"max_new_tokens": 24, "max_context": 64, "kv_cache_gb": 0.1, "cpus": 0, "stop": ENDS},
        "learner": {"lr": 1e-3, "critic_lr": 1e-3, "cpus": 0, "torch_threads": 1},
        "supervised": {"batch": 16, "held_out_fraction": 0.2},  # some of 8 questions
        "tracking": {"wandb": "off", "terminal": "plain"},
        **sections,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


start = partial(start_command, does="train")


def output(job: Path) -> str:
    return (job.parent / "output.txt").read_text()


def test_two_rounds_of_search_in_training_killed_and_resumed(tiny_model_dir: Path, tmp_path: Path) -> None:
    search = {"method": "beam", "settings": {"paths": 2, "width": 3}, "separator": 2, "scorer": {"name": "prm"}, "items": 8}
    rounds = {"n": 2, "questions": 16, "samples": 4, "phases": {"value": {"learner": {"lr": 1e-4}}}}
    job, run = write_job(tmp_path, tiny_model_dir, search=search, rounds=rounds), tmp_path / "loop"
    results = run / "round-01" / "search" / "search" / "results.jsonl"
    process, deadline = start(job), time.monotonic() + 1500
    while not results.is_file() or results.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, output(job)[-3000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    kept = results.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert start(job).wait(300) == 1 and "exists" in output(job), "an existing run is not overwritten"
    assert start(run / "config.yaml", "--resume").wait(2400) == 0, output(run / "config.yaml")[-3000:]
    assert results.read_bytes().startswith(kept), "searches that had ended are not run again"

    records = read_jsonl(run / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2]
    for record in records:
        assert {"eval/accuracy", "eval/tokens", "searched/accuracy", "searched/tokens", "searched/scorer_tokens"} <= set(record)
        assert record["eval/tokens"] > 0 and record["searched/scorer_tokens"] > 0 and record["value/loss"] >= 0
    assert records[2]["value/paths"] > records[1]["value/paths"] > records[0]["value/paths"], "old and new samples"
    phases = Counter((r["step"], r["phase"]) for r in read_jsonl(run / "phases.jsonl"))
    assert set(phases.values()) == {1} and len(phases) == 4 + 2 * 5, "each phase once"

    learnt, _ = read_examples([str(run / "round-02" / "policy.jsonl")], "sft", SupervisedConfig(), None)  # type: ignore[arg-type]
    assert learnt and all(example.reward == 1.0 for example in learnt), "right paths alone"
    assert len({example.partial.tokens for example in learnt}) == len(learnt)
    valued, _ = read_examples([str(run / "round-02" / "value.jsonl")], "value", SupervisedConfig(), None)  # type: ignore[arg-type]
    assert {example.reward for example in valued} == {0.0, 1.0}, "right and wrong ones"
    drawn = CliRunner().invoke(app, ["plot", str(run), "--out", str(tmp_path / "c.png"), "--metric", "searched/accuracy"])
    assert drawn.exit_code == 0, drawn.output
    told = output(run / "config.yaml")  # of the resumed run
    assert "round 2/2, searched: " in told and "finished after 2 of 2 steps" in told
    options = ["--model", str(run / "model"), "name=after", "search.items=2", f"search.scorer.args.model={run / 'judge'}"]
    command = [sys.executable, "-m", "reasoner_ray.cli", "search", str(run / "config.yaml"), *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    evaluated = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]


def test_a_process_reward_model_is_refreshed_between_rounds_of_rl(
    tiny_model_dir: Path,
    tmp_path: Path,
    supervised_job: Callable[..., JobConfig],  # noqa: F811
) -> None:
    config = supervised_job("prm")
    learner = Learner(config)
    learner.train_step([[e.trajectory("prm", config.supervised) for e in make_examples(16)]])
    learner.export(tmp_path / "prm")
    process = {"args": {"model": str(tmp_path / "prm"), "dtype": "float32", "threads": 1}, "separator": "e", "weight": 0.5}
    job = write_job(
        tmp_path,
        tiny_model_dir,
        scoring={"scorers": [{"name": "tests.labels.scorers:sometimes"}], "process": process},
        learner={"lr": 1e-3, "critic_lr": 1e-2, "cpus": 0, "torch_threads": 1, "critic_hidden": [16]},
        trainer={"steps": 2, "tasks_per_step": 2, "samples_per_task": 4, "eval_tasks": 4},
        labels={"method": "math_shepherd", "completions": 4, "solutions": 2, "items": 8},
        search={"items": 6},
        rounds={"recipe": "process_rewards", "n": 1, "samples": 3},
    )
    assert start(job).wait(3000) == 0, output(job)[-3000:]
    run = tmp_path / "loop"
    first, last = read_jsonl(run / "metrics.jsonl")
    assert {"judged/score", "eval/accuracy"} <= set(first) and "judged_anew/score" not in first
    assert last["judged/score"] != last["judged_anew/score"], "the refreshed model says something else of the same policy"
    assert {"prm/loss", "prm/loss_before", "rl/process_score", "labels/labels"} <= set(last)
    assert json.loads((run / "judge" / "config.json").read_text())["architectures"]
    assert (run / "judge").resolve() == (run / "round-01" / "prm" / "model").resolve()
