"""A person's game in the terminal, with texts in the place of keyboard and screen."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

import pytest

from reasoner_ray.envs import ENTRY_POINTS, NUMERIC
from reasoner_ray.envs.data_science import DataScience
from reasoner_ray.envs.play import Played, play
from reasoner_ray.errors import ConfigError, EnvironmentProblem


def game(env_id: str, *lines: str, **kwargs: str) -> tuple[Played, str]:
    out = io.StringIO()
    return play(env_id, kwargs, source=io.StringIO("".join(f"{line}\n" for line in lines)), out=out), out.getvalue()


def test_a_whole_game_by_numbers_and_texts() -> None:
    played, screen = game("FoodPreparation", "4", "pick up the pancake", "5", "open the microwave", "5", "5")
    assert played == Played(actions=6, total=1.0, success=True, finished=True)
    assert "  4  walk to the pancake" in screen
    assert "success: return 1 in 6 actions  discounted_return 0.773781" in screen


def test_a_wording_is_passed_on() -> None:
    _, screen = game("FoodPreparation", "q", wording="dishes")
    assert "walk to the dishwasher" in screen


def test_a_game_that_the_limit_ends() -> None:
    played, screen = game("CreditChain", *["2"] * 5)
    assert played == Played(actions=5, total=-1.0, success=False, finished=True)
    assert "no success: return -1 in 5 actions" in screen


@pytest.mark.parametrize("lines", [(), ("q",), ("1", "q"), ("1",)])
def test_leaving_ends_cleanly_whether_by_q_or_by_the_end_of_the_input(lines: tuple[str, ...]) -> None:
    played, screen = game("reasoner_ray/CreditChain-v0", *lines)
    assert played == Played(actions=lines.count("1"))
    assert f"left: return 0 in {lines.count('1')} actions" in screen


def test_what_is_no_number_here_is_asked_again_and_what_is_no_action_is_played() -> None:
    played, screen = game("CreditChain", "0", "3", "-1", "", "dance")
    assert played.actions == 1
    assert all(f"there is no action {number}" in screen for number in (0, 3, -1)) and "(not an action here)" in screen


def test_a_number_is_an_answer_where_no_actions_are_listed() -> None:
    played, screen = game("tests.envs.environments_for_players:Sums", "-7")
    assert played == Played(actions=1, total=1.0, success=True, finished=True) and "'-7'" in screen


def test_texts_in_square_brackets_are_shown_as_they_are() -> None:
    played, screen = game("tests.envs.environments_for_players:Bracketed", "1")
    assert played.success and "[red]alarm[/red]" in screen and "1  [bold]run" in screen


@pytest.mark.parametrize("end", [("",), ()])
def test_a_program_is_all_lines_up_to_an_empty_one(end: tuple[str, ...]) -> None:
    body = ["for i in range(2):", "    q", "q", "return model"]
    played, screen = game("tests.envs.environments_for_players:Programs", "", *body, *end)
    assert played == Played(actions=1, total=1.0, success=True, finished=True)
    assert r"'for i in range(2):\n    q\nq\nreturn model\n'" in screen
    assert "lines, then an empty line to end them, or q as the first > " in screen
    assert DataScience.multiline


@pytest.mark.parametrize("lines", [(), ("q",), ("", "q")])
def test_leaving_without_a_program(lines: tuple[str, ...]) -> None:
    played, screen = game("tests.envs.environments_for_players:Programs", *lines)
    assert played == Played() and "left: return 0 in 0 actions" in screen


def test_an_unknown_environment_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown environment 'Foo'; known: CreditChain, .*TomatoSalad"):
        play("Foo")


@pytest.mark.parametrize("name", ["SourceTerm", "reasoner_ray/KeyToDoor-v0", "ObjectSearch"])
def test_an_environment_of_numbers_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{name} shows numbers, and a game in the terminal needs texts; known: CreditChain, DataScience, E"
    ):
        play(name)


@pytest.mark.parametrize("name", sorted(ENTRY_POINTS))
def test_numeric_names_those_that_have_no_texts(name: str) -> None:
    module, _, body = ENTRY_POINTS[name].partition(":")
    source = Path(str(find_spec(module).origin)).read_text()  # type: ignore[union-attr]
    assert (f"class {body}(gymnasium.Env[str, str])" in source or "text" in module) == (name not in NUMERIC)


def test_arguments_that_the_environment_does_not_take() -> None:
    with pytest.raises(ConfigError, match="^wording: unknown wording 'chese'; did you mean 'cheese'"):
        play("FoodPreparation", {"wording": "chese"})
    with pytest.raises(ConfigError, match=r"^wordng: unknown key; did you mean 'wording'\?$"):
        play("FoodPreparation", {"wordng": "cheese"})
    with pytest.raises(ConfigError, match="unknown environment 'FodPreparation'; did you mean 'FoodPreparation'"):
        play("FodPreparation")
    with pytest.raises(ConfigError, match="colour"):
        play("CreditChain", {"colour": "red"})


def test_an_environment_that_fails_is_named() -> None:
    with pytest.raises(EnvironmentProblem, match="Broken.*step raised ZeroDivisionError"):
        game("tests.envs.environments_for_players:Broken", "anything")
