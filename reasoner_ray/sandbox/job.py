"""What a launcher is told and what it answers: one line of JSON, then the bytes of files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

from reasoner_ray.sandbox.limits import Level, Limits

PROGRAM = "program.py"
"""Name of the program in its scratch folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One program and how to run it."""

    level: Level
    limits: Limits
    folder: str  # an empty folder of the host: scratch folder, or where the program's own root is mounted
    readable: tuple[str, ...]  # interpreter and packages
    hidden: tuple[str, ...]  # what of them is not to be seen
    runner: str  # source of the module that runs the program
    files: Mapping[str, bytes]  # what the scratch folder holds at the start, the program among it
    wanted: tuple[str, ...]  # result files to hand back


@dataclass(slots=True, kw_only=True)
class Report:
    """How a program ended; ``failure`` says why it could not be started as asked."""

    status: str = "ok"
    error_type: str | None = None
    detail: str = ""
    line: int | None = None
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    failure: str = ""
    outputs: dict[str, bytes] = field(default_factory=dict)


def pack_job(job: Job) -> bytes:
    """The job as the launcher is sent it."""
    fields = {name: getattr(job, name) for name in ("level", "folder", "readable", "hidden", "runner", "wanted")}
    return _pack({**fields, "limits": asdict(job.limits)}, job.files)


def read_job(stream: BinaryIO) -> Job:
    """The launcher's side of ``pack_job``."""
    header, files = _unpack(stream)
    for name in ("readable", "hidden", "wanted"):
        header[name] = tuple(header[name])
    level, limits = Level(header.pop("level")), Limits(**header.pop("limits"))
    return Job(level=level, limits=limits, files=files, **header)


def pack_report(report: Report) -> bytes:
    """The report as the launcher sends it."""
    header = asdict(report)
    return _pack(header, header.pop("outputs"))


def read_report(stream: BinaryIO) -> Report:
    """The starter's side of ``pack_report``. Raises ``ValueError`` where it was cut off."""
    header, outputs = _unpack(stream)
    return Report(**header, outputs=outputs)


def _pack(header: dict[str, Any], files: Mapping[str, bytes]) -> bytes:
    sizes = [(name, len(data)) for name, data in files.items()]
    return b"".join([json.dumps({**header, "files": sizes}).encode(), b"\n", *files.values()])


def _unpack(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, bytes]]:
    header = json.loads(stream.readline())
    files = {}
    for name, size in header.pop("files"):
        files[name] = stream.read(size)
        if len(files[name]) != size:
            raise ValueError(f"cut off within {name}")
    return header, files
