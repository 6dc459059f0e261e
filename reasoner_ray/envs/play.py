"""A person plays an environment in the terminal, as the language model does: it sees the observation, and chooses an action."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import gymnasium
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from reasoner_ray.envs import ENTRY_POINTS, NUMERIC
from reasoner_ray.envs.player import EnvironmentFailure, EnvironmentSpec, Player, StepResult
from reasoner_ray.errors import ConfigError, EnvironmentProblem
from reasoner_ray.registry import suggest


@dataclass(slots=True)
class Played:
    """How a game went."""

    actions: int = 0
    total: float = 0.0  # sum of the rewards
    success: bool = False
    finished: bool = False  # by the environment, not by the player


def play(
    env_id: str,
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    source: TextIO | None = None,
    out: TextIO | None = None,
) -> Played:
    """One episode of ``env_id`` (a Gymnasium id, the bare name of a built-in environment, or ``module:Class``).

    Each line of ``source`` (standard input) is the number of an action, its text, or ``q``; the end of the input ends
    the game too. Where the environment lists no actions and its class says ``multiline = True``, an action is all lines
    up to an empty one. ``out`` (standard output) gets what the player sees.

    Raises ``ConfigError`` where there is no such environment or it does not take ``kwargs``, ``EnvironmentProblem`` where
    it needs something that is not installed or fails.
    """
    player = Player(EnvironmentSpec(id=_full_id(env_id), kwargs=dict(kwargs or {})))
    try:
        player.make()
        return _game(player, seed, source or sys.stdin, Console(file=out, highlight=False))
    except EnvironmentFailure as failure:
        raise EnvironmentProblem(str(failure)) from failure
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("task.args.kwargs.")) from error  # the player wrote no job
    finally:
        player.close()


def _full_id(name: str) -> str:
    full = f"reasoner_ray/{name}-v0" if name in ENTRY_POINTS else name
    texts = sorted(set(ENTRY_POINTS) - set(NUMERIC))
    if full not in gymnasium.registry and ":" not in full:
        raise ConfigError(f"unknown environment {name!r}; {suggest(name, texts)}, or module:Class of your own")
    if full.removeprefix("reasoner_ray/").removesuffix("-v0") in NUMERIC:
        raise ConfigError(f"{name} shows numbers, and a game in the terminal needs texts; known: {', '.join(texts)}")
    return full


def _game(player: Player, seed: int, source: TextIO, console: Console) -> Played:
    played, result = Played(), player.reset(seed)
    while not played.finished:
        _show(console, result)
        if player.is_multiline and result.admissible is None:
            action = _ask_lines(console, source)
        else:
            action = _ask(console, source, result.admissible or [])
        if action is None:
            break
        result = player.step(action)
        played.actions += 1
        played.total += result.reward
        played.success, played.finished = result.success, result.terminated or result.truncated
        note = "  (not an action here)" if result.invalid else ""
        console.print(f"reward {result.reward:g}  return {played.total:g}  actions {played.actions}{note}", style="bold")
    if played.finished:
        console.print(Panel(Text(result.observation)))
    numbers = "".join(f"  {name} {value:g}" for name, value in result.metrics.items())
    how = "success" if played.success else "no success" if played.finished else "left"
    console.print(f"{how}: return {played.total:g} in {played.actions} actions{numbers}", style="green" if played.success else "yellow")
    return played


def _show(console: Console, result: StepResult) -> None:
    console.print(Panel(Text(result.observation)))
    for number, action in enumerate(result.admissible or [], start=1):
        console.print(Text(f"{number:>3}  {action}"))


def _ask_lines(console: Console, source: TextIO) -> str | None:
    """The next action, of several lines; None where the player leaves."""
    console.print("lines, then an empty line to end them, or q as the first > ", end="")
    lines: list[str] = []
    while line := source.readline():
        if line.strip() == "q" and not lines:
            break
        if line.strip():
            lines.append(line)
        elif lines:
            return "".join(lines)
    console.print()
    return "".join(lines) or None


def _ask(console: Console, source: TextIO, admissible: list[str]) -> str | None:
    """The next action; None where the player leaves."""
    while True:
        console.print("number, text or q > " if admissible else "text or q > ", end="")
        line = source.readline()
        text = line.strip()
        if not line or (text == "q" and text not in admissible):
            console.print()
            return None
        if not admissible or text in admissible or not text.removeprefix("-").isdecimal():
            if text:
                return text
        elif 1 <= int(text) <= len(admissible):
            return admissible[int(text) - 1]
        else:
            console.print(f"there is no action {text}")
