"""The sandbox that an environment or a scorer uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from reasoner_ray.errors import ConfigError, EnvironmentProblem
from reasoner_ray.sandbox.levels import isolation_level, mending_command
from reasoner_ray.sandbox.limits import Level, Limits
from reasoner_ray.sandbox.program import Outcome, run_program


class Sandbox:
    """Runs programs at the strongest level that this machine has, and none where that is too weak. Safe to share by threads."""

    def __init__(
        self, limits: Limits | None = None, *, minimum: str = Level.LANDLOCK, hidden: Sequence[Path] = (), preload: Sequence[str] = ()
    ) -> None:
        """Find the level. ``minimum`` names the weakest that will do (the default keeps network, files and processes out of
        reach); ``hidden`` are files or folders of the interpreter's packages that programs must not read; ``preload`` names modules
        to import once for all programs of this process, for speed.

        Raises ``EnvironmentProblem`` where this machine does not reach the minimum, and ``ConfigError`` where it names none.
        """
        if minimum not in list(Level):
            raise ConfigError(f"minimum: no level of isolation is called {minimum!r}; one of {', '.join(Level)}")
        isolation = isolation_level()
        if isolation.level is Level.NONE or not isolation.level.reaches(Level(minimum)):
            mend = mending_command(isolation)
            raise EnvironmentProblem(
                f"generated code is not run here: the job asks for isolation of level {minimum} or stronger, this machine has "
                f"{isolation.describe()}{f'. To mend: {mend}' if mend else ''}"
            )
        self._level, self._limits, self._hidden = isolation.level, limits or Limits(), tuple(hidden)
        self._preload = tuple(preload)

    @property
    def level(self) -> Level:
        """How programs are shut in."""
        return self._level

    def run(self, source: str, inputs: Mapping[str, bytes | npt.NDArray[Any]] | None = None, wanted: Sequence[str] = ()) -> Outcome:
        """Run a program as ``run_program`` does, and wait for its end; whatever the program does becomes an outcome."""
        return run_program(
            source, inputs, level=self._level, limits=self._limits, wanted=wanted, hidden=self._hidden, preload=self._preload
        )
