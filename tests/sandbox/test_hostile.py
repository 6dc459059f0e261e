"""Every hostile program is contained: it gets nothing, leaves nothing, and the process that ran it goes on."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import psutil
import pytest

import reasoner_ray
from reasoner_ray.sandbox import launcher
from reasoner_ray.sandbox.levels import try_level
from reasoner_ray.sandbox.limits import Level, Limits
from reasoner_ray.sandbox.program import Outcome, decode_array, run_program
from tests.sandbox.hostile import PROGRAMS, Hostile

LIMITS = Limits(
    seconds=1.5,
    cpu_seconds=1,
    memory_bytes=640 << 20,
    processes=16,
    scratch_bytes=96 << 20,
    scratch_files=2000,
    text_bytes=4 << 20,
    output_bytes=64 << 20,
)
LABELS = secrets.token_hex(16).encode()
PRELOAD = (f"hostile_{secrets.token_hex(8)}",)  # no such module: it gives this test a launcher of its own
WANTED = ("loot.txt", "result.npy", "result.json")


@dataclass
class Target:
    """What the programs are after: labels in this process's memory, its environment, a file, shared memory; and its life."""

    aim: dict[str, Any]
    folder: Path
    scratch: Path  # where sandboxes make their folders
    bystander: subprocess.Popen[bytes]
    listener: socket.socket
    memory: Any  # keeps the labels where ``aim`` says that they are


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    # Not pytest's own folder, whose parents are closed to others: nothing but the sandbox is to stand in the way.
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    folder.chmod(0o777)
    scratch = Path(tempfile.mkdtemp(prefix="hostile-scratch-"))
    scratch.chmod(0o755)
    labels = folder / "labels.npy"
    labels.write_bytes(LABELS)
    labels.chmod(0o666)
    shared = shared_memory.SharedMemory(create=True, size=4096)
    shared.buf[: len(LABELS)] = LABELS
    memory = ctypes.create_string_buffer(LABELS)
    abstract = f"hostile-{secrets.token_hex(8)}"
    with (
        pytest.MonkeyPatch.context() as patch,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as local,
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10**6)"]) as bystander,
    ):
        local.bind("\0" + abstract)
        local.listen()
        listener.setblocking(False)
        patch.setenv("HOSTILE_LABELS", LABELS.decode())
        aim = {
            "pid": os.getpid(),
            "bystander": bystander.pid,
            "address": ctypes.addressof(memory),
            "folder": str(folder),
            "file": str(labels),
            "port": listener.getsockname()[1],
            "abstract": abstract,
            "shared": shared.name,
            "package": str(Path(reasoner_ray.__file__).parents[1]),
        }
        patch.setattr(tempfile, "tempdir", str(scratch))
        yield Target(aim, folder, scratch, bystander, listener, memory)
        bystander.kill()
    shared.close()
    shared.unlink()
    shutil.rmtree(folder)
    scratch.rmdir()


WEAK = [pytest.param(level, marks=pytest.mark.slow) for level in (Level.SECCOMP, Level.RLIMITS)]


@pytest.fixture(scope="module", params=[Level.NAMESPACES, Level.LANDLOCK, *WEAK])
def level(request: pytest.FixtureRequest) -> Level:
    refusal = try_level(request.param)
    if refusal:
        pytest.skip(f"this machine has no {request.param}: {refusal}")
    return Level(request.param)


def programs_left() -> set[int]:
    """Processes that came from this module's launcher: they have its command line, and that has the token."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if PRELOAD[0] in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found - {launcher.launcher(PRELOAD)._process.pid}


def run(source: str, level: Level, target: Target, limits: Limits) -> Outcome:
    aim = json.dumps(target.aim).encode()
    return run_program(source, {"target.json": aim}, level=level, limits=limits, wanted=WANTED, preload=PRELOAD)


def check_nothing_happened(target: Target, outcome: Outcome) -> None:
    """No process is left, nobody else was harmed, no file was written, nothing was learned, and the next program runs."""
    deadline = time.monotonic() + 10  # the supervisor ends just after its report
    while left := programs_left():
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.02)
    assert target.bystander.poll() is None
    assert psutil.Process(target.bystander.pid).status() != psutil.STATUS_STOPPED
    assert psutil.Process(target.bystander.pid).nice() == psutil.Process().nice()
    with pytest.raises(BlockingIOError):
        target.listener.accept()
    assert [path.name for path in target.folder.iterdir()] == ["labels.npy"]
    labels = target.folder / "labels.npy"
    assert (labels.read_bytes(), labels.stat().st_mode & 0o777) == (LABELS, 0o666)
    told = [outcome.stdout.encode(), outcome.stderr.encode(), outcome.detail.encode(), *outcome.outputs.values()]
    assert not any(LABELS in text for text in told)
    assert len(outcome.detail) <= 2000 and "\x1b" not in outcome.detail + outcome.stdout + outcome.stderr


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_contained(program: Hostile, level: Level, target: Target) -> None:
    if program.kind not in level.contained or (program.needs_seccomp and level is Level.RLIMITS):
        pytest.skip(f"{level} does not contain {program.kind}, and says so")
    outcome = run(program.source, level, target, LIMITS)
    if outcome.status == "timeout" and f"timeout:{outcome.error_type}" not in program.ends:  # a slow machine
        outcome = run(program.source, level, target, replace(LIMITS, seconds=60.0, cpu_seconds=20))
    assert f"{outcome.status}:{outcome.error_type}" in program.ends, outcome
    assert not list(target.scratch.iterdir())
    check_nothing_happened(target, outcome)
    if "result.npy" in outcome.outputs:
        with pytest.raises(ValueError):
            decode_array(outcome.outputs["result.npy"])
    if "result.json" in outcome.outputs:
        with pytest.raises(ValueError):
            json.loads(outcome.outputs["result.json"])
    honest = run("print(6 * 7)", level, target, Limits())
    assert (honest.status, honest.stdout) == ("ok", "42\n"), honest


def test_the_bait_is_real(target: Target) -> None:
    """Outside a sandbox the same aims are hit, so that a miss inside says something."""
    assert Path(target.aim["file"]).read_bytes() == LABELS
    assert ctypes.string_at(target.aim["address"], len(LABELS)) == LABELS
    assert Path("/dev/shm", target.aim["shared"]).read_bytes()[: len(LABELS)] == LABELS
    with socket.create_connection(("127.0.0.1", target.aim["port"]), 5):
        target.listener.accept()[0].close()
    os.kill(target.aim["bystander"], 0)
