"""The README's examples are the files they say they are, and they work."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

from reasoner_ray import cli
from reasoner_ray.algorithms import get_algorithm
from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.data.tasks import get_task
from reasoner_ray.models import load_tokenizer
from reasoner_ray.rollout.worker import RolloutWorker
from reasoner_ray.scoring.base import Answer, Term, build_scorer
from reasoner_ray.trajectory import Status, Trajectory, TrajectoryBuilder, flatten
from tests.rollout.fakes import ScriptedEngine

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", README, flags=re.DOTALL))
COMMANDS = [c.replace("\\\n", " ") for c in re.findall(r"```bash\n(PYTHONPATH=\. reasoner train .*?)```", README, flags=re.DOTALL)]


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it: the checkout's jobs, and the examples' files."""
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(command: str, folder: Path, *more: str) -> str:
    """What a command of the README prints, with ``more`` arguments."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    line = f"{command.strip()} {shlex.join(more)}"
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def game_job(tiny_model_dir: Path) -> JobConfig:
    overrides = [word for word in shlex.split(COMMANDS[1]) if re.match(r"(task|rollout|scoring)\.", word)]
    return load_config(ROOT / "jobs/quickstart.yaml", [*overrides, f"model.path={tiny_model_dir}"])


def one_token_answer(group: str, reward: float) -> Trajectory:
    builder = TrajectoryBuilder(id=f"{group}-{reward}", group_id=group, task="t")
    builder.add_env([1, 2])
    builder.add_model([3, 4], [-0.5, -0.5], [0, 0])
    builder.add_reward(reward)
    return builder.build()


def test_there_is_an_example_of_each_kind() -> None:
    assert set(EXAMPLES) == {"my_task.py", "my_reward.py", "my_algorithm.py", "my_game.py", "my_search.py"}
    assert len(COMMANDS) == 2


def test_the_search_example_is_the_one_that_is_tested() -> None:
    """By tests/agents/agdc/test_own_search.py."""
    assert EXAMPLES["my_search.py"] == (ROOT / "tests/agents/agdc/my_search.py").read_text()


def test_the_task_example(examples: Path) -> None:
    task = get_task(load_config(None, ["task.name=my_task:Reverse"]).task)
    assert [(i.id, i.answer) for i in task.held_out()] == [("stop", "pots")]
    assert len(task.train()) == 3


def test_the_reward_example(examples: Path) -> None:
    scorer = build_scorer(Term("my_reward:overlap"))
    (item,) = get_task(load_config(None, ["task.name=my_task:Reverse"]).task).held_out()
    assert [scorer.score(Answer(text=text), item) for text in (" pots\n", "poXX", "", "stop")] == [1.0, 0.5, 0.0, 0.0]


def test_the_algorithm_example(examples: Path) -> None:
    algorithm = get_algorithm("my_algorithm:Reinforce")
    streams = flatten([one_token_answer("a", 1.0), one_token_answer("b", 0.0)])
    credit = algorithm.credit(streams, algorithm.settings({}))
    assert credit.advantages.tolist() == [0.5, 0.5, -0.5, -0.5]
    assert load_config(None, ["algorithm.name=my_algorithm:Reinforce", "learner.critic=none"]).algorithm.name == "my_algorithm:Reinforce"


def test_the_environment_example(examples: Path, tiny_model_dir: Path) -> None:
    """Played by a worker: a policy that guesses 5, then 7, finds the 7 and gives up on the 8."""
    config, tokenizer = game_job(tiny_model_dir), load_tokenizer(tiny_model_dir)
    engine = ScriptedEngine(lambda tokens: (tokenizer.encode("7\n" if "higher" in tokenizer.decode(tokens) else " 5\n"), "stop"))
    worker = RolloutWorker(config, engine, tokenizer)
    items = get_task(config.task).train()
    ((found,), _), ((missed,), _) = [asyncio.run(worker.run_group(items[n - 1], f"g{n}", 1)) for n in (7, 8)]
    assert tokenizer.decode(found.tokens) == "A number from 1 to 9.\nGuess: 5\nhigher\nGuess:7\n"
    assert (found.status, found.total_reward) == (Status.FINISHED, 1.0)
    assert np.flatnonzero(found.rewards).tolist() == [len(found.tokens) - 1], "the reward lies on the turn that earned it"
    assert (missed.status, missed.total_reward, missed.info["turns"]) == (Status.TRUNCATED, 0.0, 4)


@pytest.mark.parametrize("number", [0, 1])
def test_the_commands_dry_run(number: int, examples: Path) -> None:
    assert "# derived" in run(COMMANDS[number], examples, "--dry-run")


@pytest.mark.long
def test_the_examples_train_together(examples: Path, tiny_model_dir: Path) -> None:
    small = [
        *(f"model.path={tiny_model_dir}", "model.dtype=float32", f"out={examples / 'runs'}", "tracking.wandb=off", "learner.cpus=0"),
        *("trainer.steps=2", "trainer.tasks_per_step=2", "trainer.samples_per_task=2", "trainer.checkpoint_every=0"),
        *("rollout.kv_cache_gb=0.1", "rollout.cpus=0"),
    ]
    run(COMMANDS[0], examples, *small)
    records = [json.loads(line) for line in (examples / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "reward/mean" in r] == [1, 2]
    assert (examples / "runs/mine/model/model.safetensors").is_file()


def test_commands_that_texts_name_exist() -> None:
    """In the README and in the package: each `reasoner COMMAND`, and each option behind it."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    options = {name: {o for p in command.params for o in (*p.opts, *p.secondary_opts)} for name, command in commands.items()}
    texts = {file: file.read_text() for file in [ROOT / "README.md", *(ROOT / "reasoner_ray").rglob("*.py")]}
    call = re.compile(r"(?<=[`\n: ])reasoner ([a-z]+(?:-[a-z]+)*)\b([^`\n]*)")
    found = [(file, *m.groups()) for file, text in texts.items() for m in call.finditer(text)]
    assert len(found) > 15
    unknown = [(file.name, name, rest) for file, name, rest in found if set(re.findall(r"--[a-z-]+", rest)) - options.get(name, set())]
    assert not unknown
