"""Run a program that nobody trusts, from a process that has something to lose."""

from __future__ import annotations

import io
import math
import os
import re
import site
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from reasoner_ray.errors import EnvironmentProblem
from reasoner_ray.sandbox.folders import empty_folder
from reasoner_ray.sandbox.job import PROGRAM, Job
from reasoner_ray.sandbox.launcher import launcher
from reasoner_ray.sandbox.limits import Level, Limits
from reasoner_ray.sandbox.namespaces import SYSTEM

Status = Literal["ok", "error", "timeout", "memory", "processes", "output", "forbidden", "killed"]
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended. Everything in it that came from the program is bounded, and is to be believed in nothing."""

    status: Status
    error_type: str | None  # the exception's name, or Timeout, MemoryLimit, OutputLimit, SIGKILL, ...; None where status is ok
    detail: str  # what happened, at most 2000 characters
    line: int | None  # of the program's file, where an exception came from
    stdout: str  # the last 8 KiB
    stderr: str
    outputs: dict[str, bytes]  # the wanted files that it left, where status is ok
    seconds: float  # wall-clock
    peak_bytes: int  # memory of all its processes together, as far as it was seen
    level: Level


class LevelUnavailable(EnvironmentProblem):
    """This machine cannot shut a program in at the level asked for; says why."""


def run_program(
    source: str,
    inputs: Mapping[str, bytes | npt.NDArray[Any]] | None = None,
    *,
    level: Level,
    limits: Limits | None = None,
    wanted: Sequence[str] = (),
    hidden: Sequence[Path] = (),
    preload: tuple[str, ...] = (),
) -> Outcome:
    """Run Python source in a sandbox and wait for its end. Most callers want ``Sandbox``, which finds the level.

    ``inputs`` are files in the program's current folder, its only writable one (an array under ``name`` is the file
    ``name`` in npy format); ``wanted`` names result files to hand back, to be read with ``decode_array`` or as JSON, never
    with pickle; ``hidden`` are files or folders below the interpreter's that the program is not to read (their names it may
    see); ``preload`` names modules that are imported once, for all programs that name the same. Packages are those of this
    interpreter's environment; what ``PYTHONPATH`` adds is not there. The program is over where its text is: threads and exit
    handlers are not awaited.
    Raises ``LevelUnavailable``, and ``ValueError`` for an input or a file name that cannot be.
    """
    files = {name: encode_array(data) if isinstance(data, np.ndarray) else bytes(data) for name, data in (inputs or {}).items()}
    for name in (*files, *wanted):
        if not _FILE_NAME.fullmatch(name) or (name == PROGRAM and name in files):
            raise ValueError(f"not a file name for a sandbox: {name!r}")
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        job = Job(
            level=level,
            limits=limits,
            folder=folder,
            readable=readable_paths(),
            hidden=tuple(str(path) for path in hidden),
            runner=Path(__file__).with_name("runner.py").read_text(),
            files={PROGRAM: source.encode("utf-8", "surrogateescape"), **files},
            wanted=tuple(wanted),
        )
        report = launcher(preload).run(job)
        empty_folder(folder)
    if report.failure:
        raise LevelUnavailable(f"a sandbox of level {level} cannot be set up here: {report.failure}")
    values = {name: getattr(report, name) for name in ("error_type", "detail", "line", "stdout", "stderr", "outputs")}
    status: Any = report.status
    return Outcome(status=status, seconds=report.seconds, peak_bytes=report.peak_bytes, level=level, **values)


def readable_paths() -> tuple[str, ...]:
    """This interpreter and its packages: what a program may read beside the system's own folders, parents first.

    Raises ``EnvironmentProblem`` where that would be everything.
    """
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *site.getsitepackages()}
    prefixes |= {path for path in sys.path if os.path.isabs(path) and Path(path).name in ("site-packages", "dist-packages")}
    links, link = set(), Path(sys.executable)
    while link.is_symlink():
        links.add(str(link))
        link = link.parent / os.readlink(link)
    found: list[str] = []
    for path in sorted({*prefixes, *links, str(link), *(os.path.realpath(path) for path in prefixes)}):
        if not any(os.path.commonpath((path, above)) == above for above in found) and os.path.exists(path):
            found.append(path)
    home = os.path.expanduser("~")
    for path in found:
        if path not in SYSTEM and os.path.commonpath((path, home)) == path:
            raise EnvironmentProblem(f"{path} is a folder of this interpreter and holds the home folder: use one in a virtual environment")
    return tuple(found)


def encode_array(array: npt.NDArray[Any]) -> bytes:
    """An array in npy format. Raises ``ValueError`` for objects, which only pickle can write."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def decode_array(data: bytes, kinds: str = "biuf") -> npt.NDArray[Any]:
    """The array of an npy file that a program wrote, its dtype's kind among ``kinds``.

    Checks the header against the size of the data before any memory is asked for. Raises ``ValueError``, and runs nothing.
    """
    stream = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("not version 1.0 of the npy format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"not an npy file: {str(error)[:200]}") from error
    content = data[stream.tell() :]
    if dtype.kind not in kinds or len(shape) > 8 or min(shape, default=0) < 0:
        raise ValueError(f"an array of {dtype} and shape {str(shape)[:100]} is not expected")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{len(content)} bytes do not make an array of {dtype} and shape {shape}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
