"""Each limit stops what passes it, with the status and the error type that say which; an honest program meets none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from reasoner_ray.errors import ConfigError, EnvironmentProblem
from reasoner_ray.sandbox import box, launcher, levels, program
from reasoner_ray.sandbox.box import Sandbox
from reasoner_ray.sandbox.folders import empty_folder
from reasoner_ray.sandbox.levels import Isolation, isolation_level, mending_command, try_level
from reasoner_ray.sandbox.limits import Level, Limits
from reasoner_ray.sandbox.program import Outcome, decode_array, encode_array, readable_paths, run_program

GENEROUS: dict[str, Any] = {"seconds": 60.0, "cpu_seconds": 60}


@pytest.fixture(scope="module")
def level() -> Level:
    isolation = isolation_level()
    if isolation.level is Level.NONE:
        pytest.skip(f"this machine runs no sandbox: {isolation.describe()}")
    return isolation.level


def run(source: str, level: Level, *, inputs: Any = None, wanted: Any = (), hidden: Any = (), **limits: Any) -> Outcome:
    return run_program(source, inputs, level=level, limits=Limits(**{**GENEROUS, **limits}), wanted=wanted, hidden=hidden)


def test_an_honest_program(level: Level) -> None:
    source = """
import sys, numpy as np
array = np.load("numbers.npy")
np.save("doubled.npy", 2 * array)
print("done", open("note").read())
print("beware", file=sys.stderr)
"""
    inputs = {"numbers.npy": np.arange(6.0).reshape(2, 3), "note": b"words"}
    outcome = run(source, level, inputs=inputs, wanted=["doubled.npy", "missing.npy"])
    assert (outcome.status, outcome.error_type, outcome.detail, outcome.line) == ("ok", None, "", None)
    assert (outcome.stdout, outcome.stderr, outcome.level) == ("done words\n", "beware\n", level)
    assert list(outcome.outputs) == ["doubled.npy"]
    np.testing.assert_array_equal(decode_array(outcome.outputs["doubled.npy"]), 2 * np.arange(6.0).reshape(2, 3))
    assert outcome.peak_bytes > 4 << 20 and outcome.seconds > 0


LIMIT_CASES = [
    ("while True: pass", {"seconds": 0.5}, "timeout", "Timeout"),
    ("while True: pass", {"cpu_seconds": 1}, "timeout", "CpuLimit"),
    ("hoard = []\nwhile True: hoard.append(bytearray(10**6))", {"memory_bytes": 200 << 20}, "memory", "MemoryError"),
    (
        "import os, time\nfor _ in range(3): os.fork()\nhoard = os.urandom(1 << 20) * 60\ntime.sleep(100)",  # eight together
        {"memory_bytes": 300 << 20},
        "memory",
        "MemoryLimit",
    ),
    ("import os\nwhile os.fork(): pass\nimport time\ntime.sleep(100)", {"processes": 5}, "processes", None),
    ("print('x' * 200_000)", {"text_bytes": 100_000}, "output", "OutputLimit"),
    ("open('f', 'wb').write(bytes(10**7))", {"scratch_bytes": 1 << 20}, "output", None),
    ("for i in range(1000): open(f'f{i}', 'w').close()\nimport time\ntime.sleep(100)", {"scratch_files": 100}, "output", None),
    ("open('result', 'wb').write(bytes(2000))", {"output_bytes": 1000}, "output", "OutputLimit"),
    ("hoard = [open('/dev/null') for _ in range(1000)]", {"open_files": 50}, "error", "OSError"),
]


@pytest.mark.parametrize(("source", "limits", "status", "error_type"), LIMIT_CASES, ids=[str(case[1]) for case in LIMIT_CASES])
def test_limits(source: str, limits: dict[str, Any], status: str, error_type: str | None, level: Level) -> None:
    outcome = run(source, level, wanted=["result"], **limits)
    assert outcome.status == status, outcome
    assert error_type is None or outcome.error_type == error_type, outcome
    assert not outcome.outputs


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="processes"):
        Limits(processes=0)


@pytest.mark.parametrize(
    ("source", "error_type", "detail", "line"),
    [
        ("x = 1\nmodel = foo(x)", "NameError", "NameError: name 'foo' is not defined (line 2: model = foo(x))", 2),
        ("def f(:\n  pass", "SyntaxError", "SyntaxError", 1),
        ("import sys\nsys.exit('no luck')", "SystemExit", "exit status 1: no luck", None),
        ("import json\njson.loads('{')", "JSONDecodeError", "(line 2: json.loads('{'))", 2),
        ("raise Exception('\\x1b[31mred')", "Exception", "Exception: ?[31mred", 1),
        ("class Ä(Exception): pass\nraise Ä", "Unnamed", "Ä", 2),
        ("raise ExceptionGroup('several', [ValueError()])", "ExceptionGroup", "several", 1),
        ("raise KeyboardInterrupt", "KeyboardInterrupt", "", 1),
        ("def f(): f()\nf()", "RecursionError", "maximum recursion depth", 1),
        ("raise ValueError('x' * 10**6)", "ValueError", "xxx", 1),
        ("raise ValueError('\\udcff')", "ValueError", "?", 1),
    ],
)
def test_errors_are_told(source: str, error_type: str, detail: str, line: int | None, level: Level) -> None:
    outcome = run(source, level)
    assert (outcome.status, outcome.error_type, outcome.line) == ("error", error_type, line), outcome
    assert detail in outcome.detail and len(outcome.detail) <= 2000


def test_a_program_knows_nothing_of_its_surroundings(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "token")
    source = "import json, os, sys\nprint(json.dumps([dict(os.environ), sys.path, sorted(globals()), os.listdir()]))"
    environment, path, names, files = json.loads(run(source, level).stdout)
    assert "token" not in str(environment) and "WANDB_API_KEY" not in environment
    assert not [entry for entry in path if entry in ("", str(Path(program.__file__).parents[2]))]
    assert names == ["__builtins__", "__file__", "__name__", "json", "os", "sys"]
    assert files == ["program.py"]


def test_children_of_a_program_work(level: Level) -> None:
    source = """
import subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(2) as pool: assert list(pool.map(abs, [-1, -2])) == [1, 2]
print(subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True).stdout)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
"""
    assert run(source, level).stdout.split() == ["42"]


def test_hidden_paths_cannot_be_read(level: Level) -> None:
    if "files" not in level.contained:
        pytest.skip(f"{level} does not contain files")
    core = Path(np.__file__).parent / "_core"
    read = f"open({str(core / 'multiarray.py')!r}).read()"
    read_below = f"open({str(core / 'tests' / 'test_api.py')!r}).read()"
    assert run(read, level).status == "ok" and run(read_below, level).status == "ok"
    hidden = [core / "tests", core / "multiarray.py"]
    for source in (read, read_below):
        assert run(source, level, hidden=hidden).error_type in ("PermissionError", "FileNotFoundError")
    assert run(read, level, hidden=hidden[:1]).status == "ok"  # a neighbour is still there


def test_inputs_are_checked(level: Level) -> None:
    for name in ("../up", "/etc/passwd", "program.py", "", ".hidden", "a/b"):
        with pytest.raises(ValueError, match="file name"):
            run("", level, inputs={name: b""})
    with pytest.raises(ValueError):
        run("", level, inputs={"objects": np.array([{}])})


def test_arrays_are_read_without_pickle() -> None:
    for array in (np.arange(5), np.asfortranarray(np.ones((2, 3), np.float32)), np.zeros((0, 4)), np.array(3.0), np.array([True])):
        back = decode_array(encode_array(array))
        np.testing.assert_array_equal(back, array)
        assert back.dtype == array.dtype
    with pytest.raises(ValueError, match="not expected"):
        decode_array(encode_array(np.array(["text"])))
    for broken in (b"", b"\x93NUMPY", b"junk" * 100, encode_array(np.arange(5))[:-1], encode_array(np.arange(5)) + b"x"):
        with pytest.raises(ValueError):
            decode_array(broken)


def test_the_scratch_folder_is_emptied_however_deep(tmp_path: Path) -> None:
    here = Path.cwd()
    (tmp_path / "link").symlink_to(here)
    try:
        os.chdir(tmp_path)
        for _ in range(1500):  # deeper than recursion goes and than a path may be long
            os.mkdir("d")
            os.chdir("d")
        Path("file").touch()
        os.mkdir("locked", 0)
    finally:
        os.chdir(here)
    empty_folder(str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert here.is_dir()


def test_the_home_folder_is_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert readable_paths() and str(Path.home()) not in readable_paths()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    with pytest.raises(EnvironmentProblem, match="home folder"):
        readable_paths()


def test_a_killed_worker_takes_its_program_along(level: Level) -> None:
    folder = Path(tempfile.mkdtemp(prefix="killed-"))  # not pytest's own, whose parents are closed to others
    folder.chmod(0o755)
    worker = f"""
import sys, tempfile; sys.path[:] = {sys.path!r}; tempfile.tempdir = {str(folder)!r}
from reasoner_ray.sandbox.limits import Level, Limits
from reasoner_ray.sandbox.program import run_program
source = "import os, time\\nopen('file', 'w').close()\\nos.fork()\\ntime.sleep(1000)"
run_program(source, level=Level({str(level)!r}), limits=Limits(seconds=900.0))
"""
    process = subprocess.Popen([sys.executable, "-c", worker])
    below = _wait_for_descendants(process.pid, 4 if level is Level.NAMESPACES else 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive
    left = [path for path in folder.rglob("*") if path.is_file()]
    shutil.rmtree(folder)
    assert not left


def test_an_interrupted_worker_ends_its_program(level: Level) -> None:
    """What it started is gone, and the launcher is ready for the next program."""

    def interrupt() -> None:
        below.extend(_wait_for_descendants(keeper, 3))
        os.kill(os.getpid(), signal.SIGINT)

    keeper = launcher.launcher(())._process.pid
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
    below: list[psutil.Process] = []
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run("import os, time\nos.fork()\ntime.sleep(1000)", level)
    thread.join()
    signal.signal(signal.SIGINT, before)
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive
    assert run("print(1)", level).stdout == "1\n"
    assert launcher.launcher(())._process.pid == keeper


def _wait_for_descendants(pid: int, count: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 60
    while len(found := psutil.Process(pid).children(recursive=True)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_programs_run_side_by_side(level: Level) -> None:
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(run("print(1)", level, processes=3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.stdout for outcome in outcomes] == ["1\n"] * 4


def test_levels_are_ordered_and_say_what_they_contain() -> None:
    assert Level.NAMESPACES.reaches(Level.LANDLOCK) and not Level.SECCOMP.reaches(Level.LANDLOCK)
    sizes = [len(level.contained) for level in Level]
    assert sizes == sorted(sizes, reverse=True)


def test_this_machine_has_a_level(level: Level) -> None:
    assert try_level(level) == ""
    assert str(level) in isolation_level().describe()


def test_a_level_that_leaks_is_not_believed(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe asks for what is claimed: a weaker sandbox under a stronger name is found out."""
    monkeypatch.setattr(program, "run_program", lambda *args, **kwargs: run_program(*args, **{**kwargs, "level": Level.RLIMITS}))
    refusal = try_level(Level.LANDLOCK)
    assert "network" in refusal or "failed" in refusal or "may not read" in refusal


def test_a_weak_machine_runs_no_generated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = Isolation(Level.SECCOMP, {Level.NAMESPACES: "Operation not permitted", Level.LANDLOCK: "this kernel has no Landlock"})
    monkeypatch.setattr(box, "isolation_level", lambda: weak)
    with pytest.raises(EnvironmentProblem, match="landlock.*this machine has seccomp.*no Landlock.*To mend: "):
        Sandbox()
    assert Sandbox(minimum="seccomp+rlimits").level is Level.SECCOMP
    monkeypatch.setattr(box, "isolation_level", lambda: Isolation(Level.NONE, {}))
    with pytest.raises(EnvironmentProblem):
        Sandbox(minimum="none")
    with pytest.raises(ConfigError, match="strong"):
        Sandbox(minimum="strong")


def test_what_mends_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mending_command(Isolation(Level.NAMESPACES, {})) == ""
    unreadable = Isolation(Level.NONE, {Level.LANDLOCK: f"user 7 may not read {os.__file__}"})
    assert mending_command(unreadable).startswith("chmod")
    unchanging = Isolation(Level.NONE, dict.fromkeys((Level.NAMESPACES, Level.LANDLOCK), "root may not change to another user here"))
    assert "ordinary user" in mending_command(unchanging)
    assert unchanging.describe().count("another user") == 1
    assert mending_command(Isolation(Level.SECCOMP, {Level.LANDLOCK: "none"}))
    monkeypatch.setattr(levels.sys, "platform", "darwin")
    assert "needs Linux" in try_level(Level.RLIMITS)


def test_a_launcher_that_breaks_is_an_outcome(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_running", {})
    monkeypatch.setattr(launcher, "_BOOT", "raise SystemExit('broken')")
    outcome = run("", level)
    assert (outcome.status, outcome.error_type, outcome.detail) == ("killed", "LauncherDied", "broken")
    launcher.close_launchers()
    monkeypatch.setattr(launcher, "_BOOT", "import time; time.sleep(1000)")
    monkeypatch.setattr(launcher, "PATIENCE_SECONDS", 1.0)
    assert run("", level, seconds=0.1).error_type == "LauncherHung"
    launcher.launcher(())._process.kill()
    launcher.close_launchers()


def test_a_launcher_is_kept_and_replaced(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_running", {})
    first = launcher.launcher(("colorsys",))
    source = "import sys\nprint('colorsys' in sys.modules, [name for name in sys.modules if name.startswith('reasoner')])"
    warm = run_program(source, level=level, preload=("colorsys", "no_such_module"))
    assert (warm.status, warm.stdout) == ("ok", "True []\n")
    assert run(source, level).stdout == "False []\n"
    assert launcher.launcher(("colorsys",)) is first
    first._process.kill()
    first._process.wait()
    assert run_program("print(1)", level=level, preload=("colorsys",)).stdout == "1\n"
    assert launcher.launcher(("colorsys",)) is not first
    launcher.close_launchers()


def test_programs_draw_different_numbers(level: Level) -> None:
    source = "import random, numpy\nprint(random.random(), numpy.random.rand())"
    drawn = {run_program(source, level=level, preload=("numpy",)).stdout for _ in range(2)}
    assert len(drawn) == 2


def test_nothing_of_one_program_is_left_for_the_next(level: Level) -> None:
    """The launcher's forks read the jobs, the launcher does not: no program finds another's data in its own memory."""
    if level is Level.LANDLOCK:
        pytest.skip(f"{level} closes a program's own memory to it")
    other, own = os.urandom(16).hex(), os.urandom(16).hex()
    assert run(f"mine = {other!r}", level, inputs={"labels": other.encode() * 1000}).status == "ok"
    # As patterns, so that looking for a text does not put it into memory.
    patterns = ["".join(f"[{letter}]" for letter in text) for text in (other, own)]
    search = f"""
import re
found = [0, 0]
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as memory:
    for line in maps:
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if "r" in line.split()[1] and "[v" not in line:
            memory.seek(start)
            data = memory.read(end - start)
            for index, pattern in enumerate({patterns}):
                found[index] += len(re.findall(pattern.encode(), data))
print(found[0], found[1] > 0)
"""
    assert run(search, level, inputs={"labels": own.encode()}).stdout == "0 True\n"
