"""Tasks, their order and their lengths; arithmetic by hand."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.config import TaskConfig
from reasoner_ray.data.arithmetic import ArithmeticTask
from reasoner_ray.data.tasks import DataOrder, Item, Task, check_lengths, get_task
from reasoner_ray.errors import CheckpointError, ConfigError, DataError
from tests.conftest import make_tiny_tokenizer


def items(n: int) -> list[Item]:
    return [Item(id=f"i{i}", prompt=f"{i} =", answer=str(i)) for i in range(n)]


class Chat(Task):
    """A task of one chat, to be named by a dotted path."""

    def __init__(self, *, seed: int = 0, text: str = "hello") -> None:
        self.item = Item(id="c", prompt=[{"role": "user", "content": text}], answer="")

    def train(self) -> list[Item]:
        return [self.item]

    def held_out(self) -> list[Item]:
        return []


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 2**31))
def test_every_epoch_visits_every_item_once(n: int, epoch: int, seed: int) -> None:
    order = DataOrder(items(n), seed)
    visited = Counter(order[i].id for i in range(epoch * n, (epoch + 1) * n))
    assert visited == Counter(i.id for i in items(n))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first, again, other = DataOrder(items(50), 1), DataOrder(items(50), 1), DataOrder(items(50), 2)
    forwards = [first[i].id for i in range(150)]
    assert forwards == list(reversed([again[i].id for i in reversed(range(150))]))  # in any order of asking, across epochs
    assert forwards[:50] != forwards[50:100]
    assert forwards[:50] != [other[i].id for i in range(50)]


def test_the_order_is_the_same_in_another_process() -> None:
    code = "from tests.data.test_tasks import items, DataOrder; print([DataOrder(items(9), 3)[i].id for i in range(9)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    order = DataOrder(items(9), 3)
    assert done.stdout.strip() == str([order[i].id for i in range(9)])


def test_resuming_with_other_data_is_refused() -> None:
    order = DataOrder(items(5), 1)
    order.check(DataOrder(items(5), 1).fingerprint)
    for other in (DataOrder(items(6), 1), DataOrder(items(5), 2)):
        with pytest.raises(CheckpointError, match="other training data"):
            order.check(other.fingerprint)


def test_the_fingerprint_covers_what_is_asked_and_answered() -> None:
    """Ids alone say nothing of another instruction, another difficulty or an edited file."""
    given = Item(id="a", prompt="1 + 1 =", answer="2")
    fingerprints = {DataOrder([i], 0).fingerprint for i in (given, replace(given, prompt="1 + 2 ="), replace(given, answer="3"))}
    assert len(fingerprints) == 3


def test_no_training_items_is_an_error() -> None:
    with pytest.raises(DataError, match="no training items"):
        DataOrder([], 0)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("arithmetik", {}, "task.name: unknown task 'arithmetik'; did you mean 'arithmetic'"),
        ("arithmetic", {"digit": 1}, "task.args.digit: unknown key; did you mean 'digits'"),
        ("arithmetic", {"seed": 1}, "task.args.seed"),
        ("arithmetic", {"op": "ad"}, "task.args.op: unknown operation 'ad'; did you mean 'add'"),
        ("arithmetic", {"digits": 0}, "task.args.digits: must be at least 1"),
        ("jsonl", {}, "task.args.path: must be given"),
        ("no_such_module:Task", {}, "cannot import 'no_such_module'"),
        ("tests.data.test_tasks:Chatt", {}, "has no 'Chatt'; did you mean 'Chat'"),
        ("tests.data.test_tasks:Chat", {"txt": ""}, "task.args.txt: unknown key; did you mean 'text'"),
        ("reasoning_gym", {"dataset": "chain_summ"}, "task.args.dataset: .*did you mean 'chain_sum'"),
        ("reasoning_gym", {"dataset": "chain_sum", "config": {"terms": 1}}, "task.args.config: .*terms"),
        ("gsm8k", {"path": "x", "style": "prose"}, "task.args.style: must be chat or text"),
    ],
)
def test_wrong_names_and_arguments_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_task(TaskConfig(name=name, args=args))


def test_render_text_and_chat() -> None:
    tokenizer = make_tiny_tokenizer()
    task = get_task(TaskConfig(name="tests.data.test_tasks:Chat"))
    assert tokenizer.decode(task.render(task.train()[0], tokenizer)) == "user: hello\nassistant: "
    assert tokenizer.decode(task.render(items(1)[0], tokenizer)) == "0 ="
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        task.render(task.train()[0], tokenizer)


def test_a_prompt_longer_than_the_context_is_named() -> None:
    tokenizer = make_tiny_tokenizer()
    task = get_task(TaskConfig(name="tests.data.test_tasks:Chat", args={"text": "so " * 90}))
    longest = check_lengths(task, tokenizer, max_context=1000, max_new_tokens=8)
    assert check_lengths(task, tokenizer, max_context=longest + 8, max_new_tokens=8) == longest  # exactly full is allowed
    with pytest.raises(
        DataError, match=rf"item c of task tests.data.test_tasks:Chat: its prompt has {longest} tokens.*leaves {longest - 1}"
    ):
        check_lengths(task, tokenizer, max_context=longest + 7, max_new_tokens=8)


@pytest.mark.parametrize(
    ("args", "prompt", "answer"),
    [
        ({"op": "add", "digits": 2}, r"\d\d \+ \d\d =", lambda a, b: a + b),
        ({"op": "multiply", "digits": 1}, r"\d \* \d =", lambda a, b: a * b),
        ({"op": "largest", "digits": 2, "terms": 3}, r"Largest of \d\d, \d\d, \d\d:", max),
        ({"op": "add", "digits": 3, "terms": 3}, r"\d{3} \+ \d{3} \+ \d{3} =", lambda a, b, c: a + b + c),
    ],
)
def test_arithmetic_is_right_and_its_splits_are_disjoint(args: dict[str, Any], prompt: str, answer: Any) -> None:
    import re

    task: Any = get_task(TaskConfig(args=args), 1)
    header, train, held_out = task.header, task.train(), task.held_out()
    assert header.count("\n") == 4
    for item in [*train, *held_out]:
        question = item.prompt.removeprefix(header)
        assert re.fullmatch(prompt, question)
        assert item.answer == str(answer(*map(int, re.findall(r"\d+", question))))
        assert f"{question} " not in header
    operands = [{tuple(sorted(re.findall(r"\d+", i.id))) for i in split} for split in (train, held_out)]
    assert operands[0] and operands[1] and not operands[0] & operands[1]
    assert len({i.id for i in [*train, *held_out]}) == len(train) + len(held_out)


def test_recorded_runs_keep_their_arithmetic_items() -> None:
    """The very items, in the very order, of the recorded benchmarks."""
    found = {seed: DataOrder(ArithmeticTask(seed=seed).train(), seed).fingerprint.rpartition(" ")[2] for seed in (0, 1)}
    assert found == {0: "33de0ff0ef9853de", 1: "31bf9b9e9a5c6232"}
    assert DataOrder(ArithmeticTask().held_out(), 0).fingerprint.endswith("512 items, sha256 cad294ddc253c745")


def test_arithmetic_seeds_share_the_held_out_set_only() -> None:
    one, two = get_task(TaskConfig(), 1), get_task(TaskConfig(), 2)
    assert one.held_out() == two.held_out() == get_task(TaskConfig(), 1).held_out()
    assert one.train() != two.train()


def test_reasoning_gym_splits_are_disjoint_for_every_seed() -> None:
    config = TaskConfig(name="reasoning_gym", args={"dataset": "chain_sum", "train_size": 300, "held_out_size": 100})
    questions = []
    for seed in (0, 1):
        task = get_task(config, seed)
        train, held_out = ({i.info["entry"]["question"] for i in split} for split in (task.train(), task.held_out()))
        assert not train & held_out
        questions.append(train)
    assert len(questions[0] & questions[1]) < 30  # only what chance repeats
    assert get_task(config, 0).train() == get_task(config, 0).train()
