"""Games of TextWorld (the PyPI package ``textworld``), generated offline from seeds and kept in the cache folder."""

from __future__ import annotations

import re
import shutil
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium import spaces

from reasoner_ray import settings
from reasoner_ray.errors import ConfigError, EnvironmentProblem

INSTALL = "pip install textworld==1.7.0"
ALIASES = frozenset("n s e w north south east west l x i get wait z".split())
"""First words of commands that the games understand beside the verbs they list."""
SEPARATORS = re.compile(r"[.,;]|\bthen\b", re.IGNORECASE)
"""What puts several commands into one line."""
NOT_UNDERSTOOD = "That's not a verb I recognise."

_TEXT = spaces.Text(min_length=0, max_length=20_000, charset=string.printable)


@dataclass(frozen=True, slots=True)
class Knobs:
    """What a game is generated from, its seed apart."""

    nb_rooms: int
    nb_objects: int
    quest_length: int  # commands of the shortest solution


class TextWorldGame(gymnasium.Env[str, str]):
    """``games`` games of one difficulty; the seed of a reset, or ``options={"game": n}``, chooses among them.

    An observation stands for itself: the objective, the game's answer, the room and what is carried. A command is
    invalid where the game does not count it as a turn. The reward is the change of the score as a share of the highest one;
    success is the quest fulfilled; ``max_steps`` commands truncate. A reset generates a game that is not in the cache
    folder, which takes some seconds. Commands reach the game one at a time and only if they start with a verb of it:
    its interpreter would also save games and transcripts into the working folder.
    """

    def __init__(
        self, *, nb_rooms: int = 3, nb_objects: int = 6, quest_length: int = 4, games: int = 8, first_seed: int = 0, max_steps: int = 50
    ) -> None:
        """The games have the seeds ``first_seed`` and on.

        Raises ``EnvironmentProblem`` where the package is missing, ``ConfigError`` for numbers out of range.
        """
        least = {"nb_rooms": 1, "nb_objects": 1, "quest_length": 1, "games": 1, "first_seed": 0, "max_steps": 1}
        given = (nb_rooms, nb_objects, quest_length, games, first_seed, max_steps)
        for (name, lowest), value in zip(least.items(), given, strict=True):
            if not isinstance(value, int) or not lowest <= value < 2**31:
                raise ConfigError(f"task.args.kwargs.{name} must be a whole number of at least {lowest} (got {value!r})")
        _package()
        self.observation_space = _TEXT
        self.action_space = _TEXT
        self._knobs = Knobs(nb_rooms, nb_objects, quest_length)
        self._games, self._first_seed, self._max_steps = games, first_seed, max_steps
        self._game: Any = None
        self._state: Any = None
        self._file: Path | None = None
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin a game. Raises ``ValueError`` for one that there is not, ``ReasonerError`` where it cannot be generated."""
        super().reset(seed=seed)
        number = (options or {}).get("game", int(self.np_random.integers(self._games)))
        if number not in range(self._games):
            raise ValueError(f"there is no game {number}, only 0 to {self._games - 1}")
        self._load(game_file(self._knobs, self._first_seed + number))
        self._game.seed(1)  # games without a seed take the time for one
        self._state, self._steps = self._game.reset(), 0
        return self._observation(""), self._info(invalid=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """One command to the game."""
        before, command = self._state, " ".join(action.split())
        self._steps += 1
        invalid = not self._is_command(command)
        answer = NOT_UNDERSTOOD
        if not invalid:
            self._state, _, _ = self._game.step(command)
            answer = _answer(self._state.feedback)
            invalid = self._state.moves == before.moves and not self._ended
        reward = (self._state.score - before.score) / self._state.max_score
        truncated = self._steps >= self._max_steps and not self._ended
        return self._observation(answer), reward, self._ended, truncated, self._info(invalid=invalid)

    def close(self) -> None:
        """End the interpreter."""
        if self._game is not None:
            self._game.close()
            self._game = self._file = None

    @property
    def _ended(self) -> bool:
        return bool(self._state.won or self._state.lost)

    def _load(self, file: Path) -> None:
        if file == self._file:
            return
        textworld = _package()
        if self._game is None:
            wanted = (
                "admissible_commands",
                "description",
                "feedback",
                "inventory",
                "lost",
                "max_score",
                "moves",
                "objective",
                "score",
                "won",
            )
            self._game = textworld.start(str(file), textworld.EnvInfos(**dict.fromkeys(wanted, True)))
        else:
            self._game.close()  # the interpreter keeps the memory of a game that another is loaded over
            self._game.load(str(file))
        self._file = file

    def _is_command(self, command: str) -> bool:
        word = command.partition(" ")[0].lower()
        return command.isascii() and not SEPARATORS.search(command) and (word in ALIASES or word in self._state.verbs)

    def _observation(self, answer: str) -> str:
        state = self._state
        room = _tidy(state.description)
        parts = (_tidy(state.objective), "" if answer in room else answer, room, _tidy(state.inventory))
        return "\n".join(part for part in parts if part).encode("ascii", "replace").decode()

    def _info(self, *, invalid: bool) -> dict[str, Any]:
        return {"admissible": list(self._state.admissible_commands), "success": bool(self._state.won), "invalid": invalid}


def game_file(knobs: Knobs, seed: int) -> Path:
    """The compiled game, generated where that has not been done; processes that come at the same time wait for the first.

    Raises ``EnvironmentProblem`` where its compiler does not run, ``ConfigError`` where there is no such game.
    """
    from filelock import FileLock

    version = _package().__version__
    difficulty = f"{version}-rooms{knobs.nb_rooms}-objects{knobs.nb_objects}-quest{knobs.quest_length}"
    folder = settings.cache_dir() / "textworld" / difficulty / f"seed{seed}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                # Only the rename makes it visible; what a killed process left behind is removed by the next.
                partial = folder.with_name(f".{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                _generate(knobs, seed, partial / "game.z8")
                partial.rename(folder)
    return folder / "game.z8"


def _generate(knobs: Knobs, seed: int, file: Path) -> None:
    textworld = _package()
    from textworld.generator import CouldNotCompileGameError, QuestGenerationError

    options = textworld.GameOptions()
    options.seeds, options.path = seed, str(file)
    options.nb_rooms, options.nb_objects, options.quest_length = knobs.nb_rooms, knobs.nb_objects, knobs.quest_length
    try:
        textworld.make(options)
    except (CouldNotCompileGameError, QuestGenerationError) as error:
        raise ConfigError(f"task.args.kwargs: no TextWorld game of {knobs} and seed {seed}; take smaller numbers ({error})") from error
    except OSError as error:
        raise EnvironmentProblem(
            f"TextWorld cannot generate a game: {error}; its compiler Inform 7 is a program for x86_64 (Linux, or macOS with Rosetta)"
        ) from error


def _package() -> Any:
    try:
        import textworld
    except ImportError as error:
        raise EnvironmentProblem(f"TextWorld games need a package ({error}); run `{INSTALL}`, on every node") from error
    return textworld


def _answer(feedback: str) -> str:
    """A game's answer without the prompt and status line behind it, or what it says at its end."""
    return _tidy(re.split(r"\n *\*\*\* |\n>[^\n]*\Z", feedback)[0])


def _tidy(text: str) -> str:
    return "\n".join(line for part in text.splitlines() if (line := part.strip()))
