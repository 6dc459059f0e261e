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
from reasoner_ray.yaml_text import read_yaml, write_yaml

JOBS = sorted((Path(__file__).parent.parent / "jobs").rglob("*.yaml"))


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
        (["algorithm.name=grpo", "learner.critic=none", "learner.critic_warmup=1"], r"learner\.critic_warmup: grpo has no critic"),
        (["algorithm.name=grpo", "learner.critic=none", "learner.max_kl=0.1"], r"learner\.max_kl: grpo has no critic"),
        (["kind=sft", "learner.critic_warmup=1"], r"learner\.critic_warmup: kind sft has no critic"),
        (["learner.critic_warmup=20"], r"learner\.critic_warmup: the policy would never learn in trainer\.steps=20"),
        (["learner.critic=separate", "learner.lora={rank: 8}"], r"learner\.critic: 'separate'"),
        (["algorithm.name=etpo"], r"learner\.critic: etpo learns a Q .* set learner\.critic=soft_q"),
        (["algorithm.name=etpo", "learner.critic=separate"], r"learner\.critic: etpo learns a Q .* set learner\.critic=soft_q"),
        (["learner.critic=soft_q"], r"learner\.critic: 'soft_q' is the critic of etpo.*poad.*set learner\.critic=shared"),
        (["algorithm.name=grpo", "learner.critic=soft_q"], r"learner\.critic: 'soft_q'.*grpo.*set learner\.critic=none"),
        (["algorithm.name=etpo", "learner.critic=soft_q", "learner.lora={rank: 8}"], r"learner\.lora: 'soft_q' trains a second"),
        (["algorithm.name=poad", "learner.critic=soft_q_frozen"], r"learner\.critic: 'soft_q_frozen' is the critic of etpo"),
        (["algorithm.name=etpo", "learner.critic=soft_q", "learner.zero_stage=3"], r"learner\.zero_stage: the target of 'soft_q'"),
        (["algorithm.name=etpo", "learner.critic=soft_q", "algorithm.settings.kl_coef=1"], r"algorithm\.settings\.kl_coef: unknown .*etpo"),
        (["scoring.scorers=[{name: exact_match, wieght: 1}]"], r"wieght: unknown key"),
        (["steps"], r"override 'steps' is not of the form a\.b=c"),
        (["name.x=1"], r"name"),
        (["scoring.scorers=[{name: format, args: {style: boxd}}]"], r"format\.args\.style: unknown 'boxd'; did you mean 'boxed'"),
        (["scoring.scorers=[{name: format, args: {pattern: 3}}]"], r"scoring\.scorers\.format\.args: .*TypeError"),
        (["scoring.scorers=[{name: numeric, args: {tolerance: wide}}]"], r"scoring\.scorers\.numeric\.args: .*InvalidOperation"),
        (["scoring.scorers=[{name: overlong, args: {limit: 5, margin: 9}}]"], r"overlong\.args\.margin: must be in 1\.\.limit=5"),
        (["rollout.episode=multi_trun"], r"rollout\.episode: unknown episode 'multi_trun'; did you mean 'multi_turn'"),
        (["rollout.episode=no_such_module:episode"], r"rollout\.episode: cannot import 'no_such_module'"),
        (["rollout.max_turns=3"], r"rollout\.max_turns: single_turn never has 3 turns; set rollout\.episode=multi_turn"),
        (["scoring.scorers=[{name: x"], r"scoring\.scorers: '\[\{name: x' is not valid YAML \(.*expected ',' or '\}'"),
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


def test_a_job_builds_on_others(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\nseed: 3\ntrainer: {steps: 5, tasks_per_step: 4}\ntask: {args: {digits: 1}}\n")
    (tmp_path / "large.yaml").write_text("trainer: {steps: 7}\n")
    (tmp_path / "job.yaml").write_text("extends: [base.yaml, large.yaml]\nname: job\ntrainer: {samples_per_task: 2}\ntask: {args: {}}\n")
    config = load_config(tmp_path / "job.yaml", ["trainer.tasks_per_step=6"])
    assert (config.name, config.seed, config.task.args) == ("job", 3, {}), "an empty section clears what it builds on"
    assert (config.trainer.steps, config.trainer.tasks_per_step, config.trainer.samples_per_task) == (7, 6, 2)
    (tmp_path / "base.yaml").write_text("extends: job.yaml\n")
    with pytest.raises(ConfigError, match=r"job\.yaml extends itself, by way of job\.yaml, base\.yaml"):
        load_config(tmp_path / "job.yaml")
    (tmp_path / "job.yaml").write_text("extends: gone.yaml\n")
    with pytest.raises(ConfigError, match=r"no job file at .*gone\.yaml"):
        load_config(tmp_path / "job.yaml")


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("learner: {lr: 1e-5}\ntask: {args: {held_out_fraction: 1e-2, digits: 2}}\n")
    config = load_config(tmp_path / "job.yaml", ["learner.critic_lr=2E-4", "trainer.steps=1e1", "scoring.timeout_s=5."])
    assert (config.learner.lr, config.learner.critic_lr, config.trainer.steps, config.scoring.timeout_s) == (1e-5, 2e-4, 10, 5.0)
    assert config.task.args == {"held_out_fraction": 0.01, "digits": 2}
    texts = {"a": "1e-2", "b": "-.5", "c": "08", "d": "1.2.3", "e": "1e", "f": "true"}
    assert read_yaml(write_yaml(texts)) == texts, "a text that looks like a number stays a text"
    assert read_yaml("[12, -3, 1_000, .inf, 08, 1e2x]") == [12, -3, 1000, float("inf"), "08", "1e2x"]


def test_derived_numbers_by_hand() -> None:
    config = load_config(
        None, ["trainer.tasks_per_step=8", "trainer.samples_per_task=4", "learner.updates_per_step=2", "trainer.max_staleness=1"]
    )
    numbers = derived_numbers(config)
    assert numbers["trajectories per step"] == 32
    assert numbers["trajectories per update"] == 16
    assert numbers["groups admitted at most at once"] == 16
    assert isinstance(config, JobConfig)


def test_the_command_line_plays_an_environment() -> None:
    played = CliRunner().invoke(app, ["play", "FoodPreparation", "wording=cheese"], input="walk to the cheese\nq\n")
    assert played.exit_code == 0, played.output
    assert "cheese" in played.output


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
