"""Runs that a benchmark finds: the way a run writes its configuration down is no difference."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks._runs import kept, trained
from reasoner_ray.config import load_config, to_yaml
from reasoner_ray.errors import ConfigError
from reasoner_ray.trainer.launch import load_task

JOB = Path(__file__).parent.parent / "jobs" / "agents" / "tomato_salad.yaml"


def test_a_finished_run_of_a_language_agent_is_taken_as_it_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = [f"model.path={tiny_model_dir}", f"out={tmp_path}", "trainer.steps=3"]
    config, _, _ = load_task(load_config(JOB, options))
    assert config.rollout.stop, "the task's own, which the job leaves out"
    run = config.run_dir
    (run / "model").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "metrics.jsonl").write_text('{"step": 3}\n')
    assert trained(JOB, options) == run
    with pytest.raises(ConfigError, match=r"was trained otherwise \(rollout\.stop: \['\\n'\], not \['x'\]\)"):
        trained(JOB, [*options, "rollout.stop=[x]"])


def test_what_is_kept_says_how_it_was_made(tmp_path: Path) -> None:
    file, made = tmp_path / "figures.json", list[int]()

    def make() -> dict[str, int]:
        made.append(1)
        return {"a": len(made)}

    assert kept(file, {"episodes": 5, "set": ("x",)}, make) == {"a": 1} == kept(file, {"episodes": 5, "set": ["x"]}, make)
    with pytest.raises(ConfigError, match=r"figures\.json was made otherwise \(episodes: 5, not 6\)"):
        kept(file, {"episodes": 6, "set": ["x"]}, make)
    assert made == [1]
