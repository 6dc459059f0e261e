"""Game of 24 and Countdown: every solution by exact arithmetic, and a checker that cannot be talked round."""

from __future__ import annotations

import csv
import gzip
import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.config import TaskConfig
from reasoner_ray.data.countdown import CountdownTask
from reasoner_ray.data.game24 import Game24Task, solvable_hands
from reasoner_ray.data.number_games import check_lines, evaluate, is_reachable, is_solution, solve
from reasoner_ray.data.tasks import Item, get_task
from reasoner_ray.errors import ConfigError
from reasoner_ray.scoring.base import Answer, Term, build_scorer

NAMES = ("numbers", "target")


@pytest.fixture(scope="module")
def game24() -> Game24Task:
    return Game24Task()


def score(text: str, numbers: list[int], target: int = 24) -> float:
    item = Item(id="i", prompt="", answer=target, info=dict(zip(NAMES, (numbers, target), strict=True)))
    value = build_scorer(Term("number_game")).score(Answer(text=text), item)
    assert isinstance(value, float)
    return value


def test_there_are_1362_hands_as_in_the_published_list(data_dir: Path) -> None:
    hands = set(solvable_hands())
    assert len(hands) == 1362
    with (data_dir / "puzzles/game24/24.csv").open() as file:
        published = {tuple(sorted(map(int, row["Puzzles"].split()))) for row in csv.DictReader(file)}
    assert hands == published


def test_the_hands_are_divided_by_content_and_each_has_its_solution(game24: Game24Task) -> None:
    train, held_out = game24.train(), game24.held_out()
    assert len(train) + len(held_out) == 1362 and 200 < len(held_out) < 350
    assert not {i.prompt for i in train} & {i.prompt for i in held_out}
    assert [i.id for i in Game24Task(seed=5).held_out()] == [i.id for i in held_out]
    for item in [*train, *held_out]:
        lines = item.info["solution"].splitlines()
        assert game24.check_steps(item, lines) == [True] * 4
        assert score(item.info["solution"], item.info["numbers"]) == 1.0


def test_more_solutions_of_a_hand_are_items_of_their_own() -> None:
    several = Game24Task(solutions=3, held_out_fraction=0.97).train()
    assert len({i.id for i in several}) == len(several) > len({i.prompt for i in several})
    assert len({(i.prompt, i.info["solution"]) for i in several}) == len(several)


def test_solutions_of_a_hand_that_needs_fractions() -> None:
    (only,) = solve([3, 3, 8, 8], 24)
    assert only.write(24).splitlines() == [
        "8 / 3 = 8/3 (left: 8/3 3 8)",
        "3 - 8/3 = 1/3 (left: 1/3 8)",
        "8 / 1/3 = 24 (left: 24)",
        "The answer is 8 / (3 - 8 / 3) = 24",
    ]
    assert solve([1, 1, 1, 1], 24) == []
    assert solve([4, 6], 24)[0].cost == (0, 0, 0), "the pleasant ones come first"


@pytest.mark.parametrize(
    ("answer", "numbers", "right"),
    [
        ("(10 - 4) * (9 - 5) = 24", [4, 5, 9, 10], True),
        ("(10-4)*(9-5)", [4, 5, 9, 10], True),
        ("(10 − 4) × (9 − 5)", [4, 5, 9, 10], True),
        ("8 / (3 - 8/3) = 24", [3, 3, 8, 8], True),
        ("4 * 6", [1, 1, 4, 6], False),  # not all of them
        ("4 * 6 * 1 * 1 * 1", [1, 1, 4, 6], False),  # one too often
        ("4 * 6 + 1 - 1 = 25", [1, 1, 4, 6], False),  # does not say what it makes
        ("4! * 1 * 1 * 1", [1, 1, 1, 4], False),  # reasoning-gym takes it
        ("factorial(4)", [4], False),
        ("11 * 2 + 2", [1, 1, 2, 2], False),  # digits put together
        ("4 ** 2 + 8", [4, 2, 8], False),
        ("49 // 2", [49, 2], False),
        ("-4 + 28", [4, 28], False),  # a sign is no operation on two numbers
        ("0x18", [24], False),
        ("2_4", [24], False),
        ("24.0", [24], False),
        ("1e0 * 24", [1, 24], False),
        ("23.9999999999 + 0", [0, 24], False),
        ("24 / 0", [24, 0], False),
        ("__import__('os').system('true')", [24], False),
        ("(" * 500 + "24" + ")" * 500, [24], False),
        ("(" * 140 + "24" + ")" * 140, [24], True),
        ("", [24], False),
        ("24 = 24 = 24", [24], False),
    ],
)
def test_the_checker(answer: str, numbers: list[int], right: bool) -> None:
    assert is_solution(answer, numbers, 24) is right


def test_where_the_scorer_finds_the_expression() -> None:
    hand = [1, 1, 4, 6]
    assert score("6 * 4 = 24 (left: 1 1 24)\nThe answer is 6 * 4 * 1 * 1 = 24.", hand) == 1.0
    assert score("Easy: \\boxed{6 \\times 4 \\times 1 \\times 1}", hand) == 1.0
    assert score("The answer is 5.\nNo, the answer is: $6*4*1*1 = 24$", hand) == 1.0
    assert score("6*4*1*1", hand) == 1.0
    assert score("The answer is 6*4*1*1 = 24\nThe answer is 6*4 = 24", hand) == 0.0
    assert score("the answer is 24", hand) == score("", hand) == 0.0


def test_labels_of_steps_are_exact() -> None:
    hand = [1, 1, 4, 6]
    lines = ["4 * 6 = 24 (left: 1 1 24)", "1 * 1 = 1 (left: 1 24)", "1 * 24 = 24 (left: 24)", "The answer is 4 * 6 * 1 * 1 = 24"]
    assert check_lines(lines, hand, 24) == [True] * 4
    assert check_lines(["4 * 6 = 23 (left: 1 1 23)", *lines[1:]], hand, 24) == [False] * 4, "wrong arithmetic"
    assert check_lines(["4 * 6 = 24 (left: 1 24)", *lines[1:]], hand, 24) == [False] * 4, "a number was lost"
    assert check_lines(["2 * 12 = 24 (left: 1 1 24)", *lines[1:]], hand, 24) == [False] * 4, "numbers that are not there"
    assert check_lines([lines[0], "1 + 1 = 2 (left: 2 24)", *lines[2:]], hand, 24) == [True, False, False, False], "a dead end"
    assert check_lines(["so then", *lines[1:]], hand, 24) == [False] * 4
    assert check_lines(["1 / 0 = 1/0 (left: 1/0)"], hand, 24) == [False]
    assert check_lines([*lines[:3], "The answer is 4 * 6 = 24"], hand, 24) == [True, True, True, False]


def test_lines_that_run_on_are_read_at_once() -> None:
    hand = [1, 1, 4, 6]
    began = time.monotonic()
    nines = "9" * 5000  # more than Python reads as a number
    assert check_lines([f"{nines} + 1 = 2 (left: 2)"], hand, 24) == [False]
    assert check_lines([f"The answer is{' ' * 8000}x{' ' * 8000}y"], hand, 24) == [False]
    assert time.monotonic() - began < 5, "a retrying pattern took 20 s"
    assert check_lines(["  4 * 6 = 24 (left: 1 1 24) \n"], hand, 24) == [True], "space around a line does not matter"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 13), min_size=2, max_size=4), st.integers(-30, 40))
def test_what_is_reachable_is_what_can_be_solved(numbers: list[int], target: int) -> None:
    found = solve(numbers, target)
    assert bool(found) == is_reachable(numbers, target)
    for solution in found[:20]:
        assert evaluate(solution.expression) is not None
        assert is_solution(f"{solution.expression} = {target}", numbers, target)
        assert all(check_lines(solution.write(target).splitlines(), numbers, target))


def test_fractions_in_a_step_are_numbers_like_others() -> None:
    assert is_reachable([Fraction(1, 3), 8], 24)


def test_countdown_games_have_their_solution_and_are_divided_by_content() -> None:
    task = get_task(TaskConfig(name="countdown", args={"train_size": 300, "held_out_size": 60}), seed=3)
    train, held_out = task.train(), task.held_out()
    assert (len(train), len(held_out)) == (300, 60)
    assert not {i.id for i in train} & {i.id for i in held_out}
    assert [i.id for i in CountdownTask(seed=9, held_out_size=60).held_out()] == [i.id for i in held_out]
    assert [i.id for i in CountdownTask(seed=9, train_size=300).train()] != [i.id for i in train]
    for item in [*train, *held_out]:
        assert score(item.info["solution"], item.info["numbers"], item.info["target"]) == 1.0
        assert isinstance(task, CountdownTask) and all(task.check_steps(item, item.info["solution"].splitlines()))
    six = CountdownTask(numbers=6, highest_target=999, train_size=5)
    assert all(score(i.info["solution"], i.info["numbers"], i.info["target"]) == 1.0 for i in six.train())


def test_published_countdown_games_and_solutions_pass(data_dir: Path) -> None:
    with (data_dir / "puzzles/countdown/test.jsonl").open() as lines:
        games = [json.loads(next(lines)) for _ in range(200)]
    assert all(is_reachable(g["nums"], g["target"]) for g in games)
    agreed = total = 0
    with gzip.open(data_dir / "puzzles/game24/sft_train.jsonl.gz", "rt") as rows:
        for row in (json.loads(next(rows)) for _ in range(100)):
            hand = [int(n) for n in row["question"].split()]
            for answer in row["answer"]:
                total += 1
                agreed += is_solution(answer["text"].rpartition("The answer is ")[2].partition("=")[0], hand, 24) is answer["correct"]
    assert total > 1000 and agreed / total > 0.99


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("game24", {"held_out_fraction": 1.0}, r"task\.args\.held_out_fraction: must be at least 0 and below 1"),
        ("game24", {"solutions": 0}, r"task\.args\.solutions: must be at least 1"),
        ("game24", {"style": "poem"}, r"task\.args\.style"),
        ("countdown", {"held_out_fraction": 1.5}, r"task\.args\.held_out_fraction: must be at least 0 and below 1"),
        ("countdown", {"numbers": 7}, r"task\.args\.numbers: must be in 2\.\.6"),
    ],
)
def test_bad_arguments_are_named(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_task(TaskConfig(name=name, args=args))
