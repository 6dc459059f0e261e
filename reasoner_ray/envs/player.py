"""Playing one environment: it is made from its specification, and whatever it does comes back as a result or a named failure."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from reasoner_ray import child_process
from reasoner_ray.errors import ConfigError, EnvironmentProblem, ReasonerError
from reasoner_ray.registry import check_arguments, load_dotted, suggest

if TYPE_CHECKING:
    import gymnasium

log = logging.getLogger(__name__)

T = TypeVar("T")
ErrorType = Literal["raised", "reward_not_finite", "timeout", "died", "bad_result"]

BUILT_IN = "reasoner_ray.envs.text."
"""Where the environments live that are known to answer at once, and so may be played in this process."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """An environment by name. Raises ``ConfigError`` where it cannot be one."""

    id: str  # a Gymnasium id, or module:Class
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # plain data: it travels as JSON
    isolate: bool | None = None  # in a process of its own; None: unless it is one of the built-in finite environments
    timeout_s: float = 30.0  # seconds that a step may take in a process of its own

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError(f"task.args.timeout_s must be a positive number of seconds (got {self.timeout_s})")
        try:
            plain = json.loads(json.dumps(dict(self.kwargs))) == self.kwargs
        except (TypeError, ValueError):
            plain = False
        if not plain:
            raise ConfigError(f"task.args.kwargs: environment {self.id} takes numbers, texts, lists and mappings with text keys alone")

    @cached_property
    def as_json(self) -> str:
        """The specification as text; equal ones have equal texts."""
        return json.dumps({"id": self.id, "kwargs": dict(self.kwargs), "timeout_s": self.timeout_s}, sort_keys=True)

    @cached_property
    def name(self) -> str:
        """For error texts: the id, and what it is made with."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.kwargs.items())
        return f"environment {self.id}({arguments})" if arguments else f"environment {self.id}"

    @cached_property
    def isolated(self) -> bool:
        """Whether it is played in a process of its own."""
        if self.isolate is not None:
            return self.isolate
        return not _registered().get(self.id, "").startswith(BUILT_IN)


@dataclass(slots=True, kw_only=True)
class StepResult:
    """What an environment answered; every field has been checked."""

    observation: str
    reward: float  # finite; 0 at the start
    terminated: bool
    truncated: bool
    admissible: list[str] | None  # distinct, none blank; None where the environment lists no actions
    success: bool
    invalid: bool  # it did not understand the action
    metrics: dict[str, float]  # finite numbers it reports of itself
    duration: int = 1  # of its steps that the action took: a macro action takes several
    error_type: str | None = None  # why the action failed, in the environment's own words; the episode goes on


class EnvironmentFailure(Exception):
    """An environment failed and took its episode with it; one line that names the environment and the cause."""

    def __init__(self, error_type: ErrorType, text: str) -> None:
        super().__init__(error_type, text)
        self.error_type = error_type

    def __str__(self) -> str:
        return str(self.args[1])


class Player:
    """Plays an environment in this process. After a failure it makes a new one at the next reset."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        """Nothing is made yet."""
        self._spec = spec
        self._env: gymnasium.Env[str, str] | None = None

    def make(self) -> None:
        """Make the environment. Raises ``ConfigError`` or ``EnvironmentProblem`` where that fails."""
        self._env = _make(self._spec)

    @property
    def is_multiline(self) -> bool:
        """Whether an action may take several lines: the environment's class says ``multiline = True``."""
        return bool(getattr(self._env and self._env.unwrapped, "multiline", False))

    def check_limit(self) -> None:
        """Raises ``ConfigError`` where an environment's own ``longest_step_s`` is more than a step in a process of its own may take.

        A step that ends late by the environment's rules is a result; broken off, it would be a failure, whose episode is played again.
        """
        longest = getattr(self._env and self._env.unwrapped, "longest_step_s", 0.0)
        if longest > self._spec.timeout_s:
            raise ConfigError(
                f"task.args.timeout_s: a step of {self._spec.name} may take {longest:g} seconds and would be broken off after "
                f"{self._spec.timeout_s:g}; set it to {longest:g} or more"
            )

    def reset(self, seed: int) -> StepResult:
        """Begin an episode. Raises ``EnvironmentFailure``."""
        if self._env is None:
            try:
                self.make()
            except ReasonerError as error:
                raise EnvironmentFailure("raised", str(error)) from error
        return self._attempt(self._reset, seed)

    def step(self, action: str) -> StepResult:
        """Act. Raises ``EnvironmentFailure``."""
        return self._attempt(self._step, action)

    def close(self) -> None:
        """Close the environment; errors in that are logged, no more."""
        env, self._env = self._env, None
        if env is not None:
            try:
                env.close()
            except (Exception, SystemExit) as error:  # noqa: BLE001 (someone else's code; nothing depends on it)
                log.warning("%s: close raised %s", self._spec.name, _describe(error))

    def _attempt(self, call: Callable[[T], StepResult], argument: T) -> StepResult:
        try:
            return call(argument)
        except KeyboardInterrupt:
            raise
        except EnvironmentFailure as failure:
            raise self._failure(failure.error_type, str(failure)) from failure
        except BaseException as error:  # someone else's code may raise anything, SystemExit and asyncio.CancelledError too
            raise self._failure("raised", f"{call.__name__.lstrip('_')} raised {_describe(error)}") from error

    def _failure(self, error_type: ErrorType, cause: str) -> EnvironmentFailure:
        self.close()  # what state it is in nobody knows
        return EnvironmentFailure(error_type, f"{self._spec.name}: {cause}")

    def _reset(self, seed: int) -> StepResult:
        answer: Any = self._started.reset(seed=seed)
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise _bad("reset's answer", answer, "a pair (observation, info)")
        return _read(answer[0], 0.0, False, False, answer[1])

    def _step(self, action: str) -> StepResult:
        answer: Any = self._started.step(action)
        if not (isinstance(answer, tuple) and len(answer) == 5):
            raise _bad("step's answer", answer, "a tuple (observation, reward, terminated, truncated, info)")
        return _read(*answer)

    @property
    def _started(self) -> gymnasium.Env[str, str]:
        if self._env is None:
            raise RuntimeError("step before reset")
        return self._env


def serve(pipe: Connection, spec: str) -> None:
    """The child's side of a player in a process of its own: make the environment, then play until the pipe closes."""
    # What environments print would fill the job's log, and the pipe behind it.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    player = Player(EnvironmentSpec(**json.loads(spec)))

    def answer(request: tuple[str, Any]) -> StepResult | EnvironmentFailure:
        method, argument = request
        try:
            return player.reset(argument) if method == "reset" else player.step(argument)
        except EnvironmentFailure as failure:
            return EnvironmentFailure(failure.error_type, str(failure))  # without its cause, which may not travel

    def build() -> Callable[[tuple[str, Any]], StepResult | EnvironmentFailure]:
        player.make()
        player.check_limit()
        return answer

    child_process.serve(pipe, build)
    player.close()


def _make(spec: EnvironmentSpec) -> gymnasium.Env[str, str]:
    known = _registered()
    import gymnasium

    try:
        if spec.id.partition(":")[2].isidentifier():
            env = load_dotted(spec.id, "task.args.id")(**spec.kwargs)
        else:
            if spec.id.startswith("reasoner_ray/") and spec.id in known:
                own = {key: value for key, value in spec.kwargs.items() if key not in inspect.signature(gymnasium.make).parameters}
                check_arguments(load_dotted(known[spec.id], "task.args.id"), own, "task.args.kwargs")
            env = gymnasium.make(spec.id, disable_env_checker=True, **spec.kwargs)
    except ReasonerError:
        raise
    except gymnasium.error.UnregisteredEnv as error:
        text = [name for name, entry in known.items() if not entry.startswith("gymnasium.")]  # its own have no texts
        raise ConfigError(
            f"task.args.id: unknown environment {spec.id!r}; {suggest(spec.id, text)}, or module:Class of your own"
        ) from error
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise EnvironmentProblem(f"{spec.name} needs what is not installed: {_describe(error)}") from error
    except (Exception, SystemExit) as error:  # someone else's code may raise anything
        raise ConfigError(f"task.args: {spec.name} cannot be made: {_describe(error)}") from error
    if not isinstance(env, gymnasium.Env):
        raise ConfigError(f"task.args.id: {spec.id} makes a {type(env).__name__}, which is no gymnasium.Env")
    return env


def _registered() -> dict[str, str]:
    """Gymnasium's ids and their entry points, this package's own among them (it registers them when it is imported)."""
    import gymnasium

    return {name: str(entry.entry_point) for name, entry in gymnasium.registry.items()}


def _read(observation: Any, reward: Any, terminated: Any, truncated: Any, info: Any) -> StepResult:
    """Check an answer, field by field. Raises ``EnvironmentFailure``, its text without the environment's name."""
    if not isinstance(info, dict):
        raise _bad("info", info, "a dict")
    return StepResult(
        observation=_text("observation", observation),
        reward=_reward(reward),
        terminated=_flag("terminated", terminated),
        truncated=_flag("truncated", truncated),
        admissible=_actions(info.get("admissible")),
        success=_flag('info["success"]', info.get("success", False)),
        invalid=_flag('info["invalid"]', info.get("invalid", False)),
        metrics=_metrics(info.get("metrics", {})),
        duration=_duration(info.get("steps_taken", 1)),
        error_type=_error_type(info.get("error_type")),
    )


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _bad(field, value, "a str")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise EnvironmentFailure("bad_result", f"{field} cannot be encoded: {error}") from error
    return str(value)


def _error_type(value: Any) -> str | None:
    return None if value is None else _text('info["error_type"]', value)


def _reward(value: Any) -> float:
    if not isinstance(value, Real):
        raise _bad("reward", value, "a number")
    reward = _number(value)
    if not math.isfinite(reward):
        raise EnvironmentFailure("reward_not_finite", f"reward is {reward}")
    return reward


def _number(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _flag(field: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _bad(field, value, "a bool")
    return bool(value)


def _actions(value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise _bad('info["admissible"]', value, "a list of str")
    actions = [_text('info["admissible"]', action) for action in value]
    if not all(map(str.strip, actions)):
        raise EnvironmentFailure("bad_result", 'info["admissible"] holds a blank action')
    if len(set(actions)) != len(actions):
        raise EnvironmentFailure("bad_result", f'info["admissible"] holds an action twice: {max(actions, key=actions.count)!r}')
    return actions


def _duration(value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise EnvironmentFailure("bad_result", f'info["steps_taken"] is {value!r}, not a number of steps')
    return int(value)


def _metrics(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise _bad('info["metrics"]', value, "a mapping")
    numbers = {str(name): _number(number) for name, number in value.items() if isinstance(number, Real)}
    finite = {name: number for name, number in numbers.items() if math.isfinite(number)}
    left_out = len(value) - len(finite)
    return finite | ({"metrics_left_out": float(left_out)} if left_out else {})


def _bad(field: str, value: Any, wanted: str) -> EnvironmentFailure:
    return EnvironmentFailure("bad_result", f"{field} is a {type(value).__name__}, not {wanted}")


def _describe(error: BaseException) -> str:
    """What was raised, in one line of bounded length."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 (an exception's own __str__ may raise anything)
        text = ""
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__
