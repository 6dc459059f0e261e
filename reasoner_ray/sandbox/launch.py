"""The launcher: a small interpreter that forks itself for every program, shuts the fork in, supervises it, and reports.

It stands between programs and the worker that wants them run. The worker may hold labels, tokens and a model; the
launcher was started without its environment and descriptors. It reads no job itself: each of its forks reads one, so
that nothing of one program's data is in the memory of the next.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from reasoner_ray import settings
from reasoner_ray.sandbox import confine, folders, linux, namespaces
from reasoner_ray.sandbox.job import Job, Report, pack_report, read_job
from reasoner_ray.sandbox.limits import Level
from reasoner_ray.sandbox.supervise import Supervisor


def serve(control: str, preload: str) -> None:
    """Import ``preload`` (a JSON list), then start programs until the worker closes the socket ``control`` or ends.

    Every message on it carries two descriptors: where to read a job, and where to write the report.
    """
    settings.replace_environment(confine.environment("/"))  # numeric libraries read it when they are imported
    del sys.path[0]  # where this package lies; what is needed of it is imported
    for name in json.loads(preload):
        with suppress(ImportError):  # a program that needs it will say so
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork's collections would touch, and so copy, the memory that all share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # else a program could interrupt the supervisor in its PID namespace
    requests = socket.socket(fileno=int(control))
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1, 2)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _run_one(*descriptors)
            except confine.InsideProgram as inside:
                _become_program(inside.runner, inside.environment)
            os._exit(0)  # the interpreter's end takes longer than many a program
        for descriptor in descriptors:
            os.close(descriptor)


def _run_one(job_end: int, report_end: int) -> None:
    """Run one program. Returns in its supervisor and in its supervisor's parent; in the program's process it raises."""
    launcher = os.getppid()
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(null, 2)  # nobody reads the launcher's stderr while it lives
    with open(job_end, "rb") as stream:
        job = read_job(stream)
    os.umask(0o022)
    with suppress(OSError):  # not allowed everywhere, and only decides whom Linux ends first when memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        problem = confine.problem_of_level(job.level)
        if problem:
            raise confine.CannotConfine(problem)
        report = (
            _in_namespaces(job, report_end) if job.level is Level.NAMESPACES else _run(job, confine.choose_identity(), launcher, report_end)
        )
    except confine.CannotConfine as error:
        report = Report(failure=str(error))
    except Exception as error:  # noqa: BLE001 (whatever it is, the worker must hear of it)
        report = Report(failure=f"{type(error).__name__}: {error}")
    if report is not None:
        try:
            with open(report_end, "wb") as stream:
                stream.write(pack_report(report))
        except BrokenPipeError:  # the worker has gone, or was interrupted: it cleans up nothing
            if job.level is not Level.NAMESPACES:
                with suppress(FileNotFoundError):  # an interrupted one may be at it too
                    folders.empty_folder(job.folder)
                    os.rmdir(job.folder)


def _become_program(runner: str, environment: dict[str, str]) -> None:
    """Leave nothing of the launcher but what its imports made, and run the program as ``__main__``."""
    settings.replace_environment(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoner_ray"]:
        del sys.modules[name]
    tempfile.tempdir = None  # it may have been looked up outside
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # else every program would draw the same numbers
    sys.argv[:] = ["program.py"]
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(runner, "<runner>", "exec", dont_inherit=True), vars(main))


def _in_namespaces(job: Job, report_end: int) -> Report | None:
    """The report, in the first process of a new PID namespace; None in its parent."""
    identity = confine.choose_identity()
    namespaces.enter()
    linux.die_with_parent(signal.SIGKILL)
    child = os.fork()
    if child:
        os.close(report_end)
        os.waitpid(child, 0)
        return None
    # When this process ends, Linux kills all others of its namespace.
    linux.die_with_parent(signal.SIGKILL)
    namespaces.build_root(job, identity.user, identity.group)
    return _run(job, identity, 0, report_end)


def _run(job: Job, identity: confine.Identity, parent: int, report_end: int) -> Report:
    linux.adopt_orphans()
    linux.set_memory_hidden(True)
    return Supervisor(job, confine.start(job, identity), parent, report_end).run()
