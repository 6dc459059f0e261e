"""What a program may use, and how strongly it is shut in."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal

Kind = Literal["resources", "network", "files", "processes"]


class Level(StrEnum):
    """How a program is shut in, strongest first."""

    NAMESPACES = "namespaces"
    """Own user, mount, process, network and IPC namespaces: nothing outside exists for the program; seccomp and rlimits too."""
    LANDLOCK = "landlock+seccomp"
    """Files outside exist, but Linux refuses to open them; calls that reach out are refused by seccomp."""
    SECCOMP = "seccomp+rlimits"
    """No network, but every file and process that the user may read."""
    RLIMITS = "rlimits"
    """Limits of resources alone, and not of memory outside of processes (memfd, System V)."""
    NONE = "none"
    """Nothing can be run here."""

    @property
    def contained(self) -> frozenset[Kind]:
        """What a program cannot get at, or not beyond its limits.

        ``resources``: time, memory, number of processes, scratch space; ``network``: every socket; ``files``: reading and
        writing outside its scratch folder, the interpreter and its packages; ``processes``: signals to other processes,
        their memory and environment.
        """
        return _CONTAINED[self]

    def reaches(self, minimum: Level) -> bool:
        """Whether this level shuts in at least as much as ``minimum``."""
        order = list(Level)
        return order.index(self) <= order.index(minimum)


_CONTAINED: dict[Level, frozenset[Kind]] = {
    Level.NAMESPACES: frozenset(("resources", "network", "files", "processes")),
    Level.LANDLOCK: frozenset(("resources", "network", "files", "processes")),
    Level.SECCOMP: frozenset(("resources", "network")),
    Level.RLIMITS: frozenset(("resources",)),
    Level.NONE: frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one program may use; at each limit it is stopped with everything it started."""

    seconds: float = 30.0  # wall-clock, from the start of its interpreter
    cpu_seconds: int = 60  # of each process, all its threads together
    memory_bytes: int = 2 << 30  # address space of each process, and memory of all of them together
    processes: int = 32  # threads count as processes
    scratch_bytes: int = 256 << 20  # all files of the scratch folder together, inputs included
    scratch_files: int = 4096
    open_files: int = 256
    text_bytes: int = 1 << 20  # what it may write to stdout and stderr together
    output_bytes: int = 64 << 20  # each result file that is handed back

    def __post_init__(self) -> None:
        for limit in fields(self):
            if getattr(self, limit.name) <= 0:
                raise ValueError(f"{limit.name} must be positive (got {getattr(self, limit.name)})")
