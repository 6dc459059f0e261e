"""`reasoner label` with real Ray and a real vLLM engine on the tiny model, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from reasoner_ray.journal import entries
from reasoner_ray.prm.examples import read_examples
from reasoner_ray.prm.settings import SupervisedConfig
from tests.processes import left_behind

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]  # three starts of an engine
QUESTIONS = 48
ENDS = ["e", "a", "t", "o", "1", "\n"]
"""What ends a solution: a random model says its end-of-text token too seldom."""


def job(folder: Path, model: Path) -> Path:
    tree: dict[str, Any] = {
        "name": "run",
        "out": str(folder),
        "model": {"path": str(model), "dtype": "float32"},
        "task": {"name": "arithmetic", "args": {"digits": 1, "shots": 1}},
        "scoring": {"scorers": [{"name": "tests.labels.scorers:sometimes"}]},
        "rollout": {"max_new_tokens": 24, "max_context": 64, "kv_cache_gb": 0.1, "cpus": 0, "max_groups_per_worker": 2, "stop": ENDS},
        "labels": {"separator": 2, "completions": 8, "items": QUESTIONS, "omega": {"searches": 6, "length_scale": 10}},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(job_file: Path, *options: str, does: str = "label") -> subprocess.Popen[bytes]:
    """A command of the system in a session of its own, so that it can be killed with all it started."""
    command = [sys.executable, "-m", "reasoner_ray.cli", does, str(job_file), *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    log = (job_file.parent / "output.txt").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)


def test_a_labelling_run_that_is_killed_goes_on_where_it_was(tiny_model_dir: Path, tmp_path: Path) -> None:
    job_file, folder = job(tmp_path, tiny_model_dir), tmp_path / "run" / "labels"
    output = tmp_path / "output.txt"
    journal, deadline = folder / "questions.jsonl", time.monotonic() + 300
    process = start(job_file)
    try:
        while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()[-3000:]
            time.sleep(0.02)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        family = [p for p in children if "Agent" not in p.name()]  # Ray's two give up by themselves, but only after a minute
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert not left_behind(family)
    kept = journal.read_bytes()
    whole = kept[: kept.rfind(b"\n") + 1]
    assert 4 <= whole.count(b"\n") <= QUESTIONS, "killed before its end"

    assert start(job_file).wait(120) == 1, "an existing run is not overwritten"
    assert "Go on with --resume" in output.read_text()
    assert start(folder / "config.yaml", "--resume").wait(400) == 0
    assert journal.read_bytes().startswith(whole), "what was finished is not done again"
    found = [record["id"] for record in entries(journal)]
    assert len(found) == len(set(found)) == QUESTIONS

    report = json.loads((folder / "report.json").read_text())
    assert report["questions"] == QUESTIONS and report["labels"] > 0 and report["grader_failures"] == 0
    assert report["cost"]["prompt_cached"] > 0, "completions share their prefix"
    said = (folder / "output.txt").read_text()
    assert "generated tokens a label" in said and f"questions {QUESTIONS}/{QUESTIONS}" in said
    examples, left_out = read_examples([str(folder / "labels.jsonl")], "prm", SupervisedConfig(), None)  # type: ignore[arg-type]
    assert len(examples) == report["solutions"] and not left_out, "kind prm reads it"
