"""The configuration refuses what cannot work, with the key's path and a suggestion; every job loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from reasoner_ray.cli import app
from reasoner_ray.config import JobConfig, derived_numbers, load_config, parse_config, to_yaml
from reasoner_ray.errors import ConfigError

JOBS = sorted((Path(__file__).parent.parent / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("job", JOBS, ids=lambda p: p.stem)
def test_every_job_loads_and_dry_runs(job: Path) -> None:
    config = load_config(job)
    assert parse_config(yaml.safe_load(to_yaml(config))) == config, "the resolved tree is the same job"
    result = CliRunner().invoke(app, ["train", str(job), "--dry-run"])
    assert result.exit_code == 0
    for name in derived_numbers(config):
        assert name in result.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.stepz=3"], r"trainer\.stepz: unknown key; did you mean trainer\.steps\?"),
        (["trianer.steps=3"], r"trianer: unknown key; did you mean trainer\?"),
        (["trainer.steps=many"], r"trainer\.steps: .*integer"),
        (["trainer.steps=0"], r"trainer\.steps: .*greater than or equal to 1"),
        (["learner.critic=none"], r"learner\.critic: poad needs a critic"),
        (["algorithm.name=grpo", "learner.critic=separate"], r"learner\.critic: grpo has no critic"),
        (["algorithm.name=grpo", "trainer.samples_per_task=1"], r"trainer\.samples_per_task: grpo .* at least 2"),
        (["algorithm.name=gpro"], r"algorithm\.name: unknown algorithm 'gpro'; did you mean 'grpo'"),
        (["algorithm.settings.gama_token=1"], r"algorithm\.settings\.gama_token: unknown .*gamma_token"),
        (["rollout.top_p=0.9"], r"rollout\.top_p.*constant bias"),
        (["rollout.top_k=20"], r"rollout\.top_p/top_k.*constant bias"),
        (["trainer.tasks_per_step=10", "learner.updates_per_step=4"], r"learner\.updates_per_step: 4 does not divide"),
        (["trainer.tasks_per_step=6", "learner.ranks=4"], r"learner\.ranks: 6 groups .* 4 ranks"),
        (["rollout.max_new_tokens=2000"], r"rollout\.max_new_tokens: must be below rollout\.max_context"),
        (["learner.critic=separate", "learner.lora={rank: 8}"], r"learner\.critic: 'separate'"),
        (["scoring.scorers=[{name: exact_match, wieght: 1}]"], r"wieght: unknown key"),
        (["steps"], r"override 'steps' is not of the form a\.b=c"),
        (["name.x=1"], r"name"),
    ],
)
def test_bad_input_is_refused_with_its_path(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["name=t", *overrides])


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no job file"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_config(broken)
    broken.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_config(broken)


def test_derived_numbers_by_hand() -> None:
    config = load_config(
        None, ["trainer.tasks_per_step=8", "trainer.samples_per_task=4", "learner.updates_per_step=2", "trainer.max_staleness=1"]
    )
    numbers = derived_numbers(config)
    assert numbers["trajectories per step"] == 32
    assert numbers["trajectories per update"] == 16
    assert numbers["groups admitted at most at once"] == 16
    assert isinstance(config, JobConfig)


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from reasoner_ray.cli import app; "
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0; "
        "heavy = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_users_error_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reasoner_ray.cli", "train", str(tmp_path / "none.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no job file") and len(done.stderr.strip().splitlines()) == 1
