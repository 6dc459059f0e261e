"""The README's examples are the files they say they are, and they work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reasoner_ray.algorithms import get_algorithm
from reasoner_ray.config import load_config
from reasoner_ray.data.tasks import get_task
from reasoner_ray.trajectory import Trajectory, TrajectoryBuilder, flatten

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", README, flags=re.DOTALL))


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def one_token_answer(group: str, reward: float) -> Trajectory:
    builder = TrajectoryBuilder(id=f"{group}-{reward}", group_id=group, task="t")
    builder.add_env([1, 2])
    builder.add_model([3, 4], [-0.5, -0.5], [0, 0])
    builder.add_reward(reward)
    return builder.build()


def test_there_is_an_example_of_each_kind() -> None:
    assert set(EXAMPLES) == {"my_task.py", "my_reward.py", "my_algorithm.py"}


def test_the_task_example(examples: Path) -> None:
    task = get_task(load_config(None, ["task.name=my_task:Reverse"]).task)
    assert [(i.id, i.answer) for i in task.held_out()] == [("stop", "pots")]
    assert len(task.train()) == 3


def test_the_algorithm_example(examples: Path) -> None:
    algorithm = get_algorithm("my_algorithm:Reinforce")
    streams = flatten([one_token_answer("a", 1.0), one_token_answer("b", 0.0)])
    credit = algorithm.credit(streams, algorithm.settings({}))
    assert credit.advantages.tolist() == [0.5, 0.5, -0.5, -0.5]
    assert load_config(None, ["algorithm.name=my_algorithm:Reinforce", "learner.critic=none"]).algorithm.name == "my_algorithm:Reinforce"
