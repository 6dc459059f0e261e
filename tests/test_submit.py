"""Submitting to a real Ray head on loopback, and the errors before anything is submitted."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from reasoner_ray import submit
from reasoner_ray.errors import ConfigError, EnvironmentProblem
from reasoner_ray.trainer.checkpoint import list_checkpoints, read_driver_state
from tests.test_runs import job

ROOT = Path(__file__).resolve().parents[1]


def free_ports(count: int) -> list[int]:
    """Free ports below the range from which the system hands out others, so that they stay free until Ray takes them."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            break
    return found


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The dashboard's address of a Ray head of its own, on ports of its own, in a session folder of its own, behind a token."""
    gcs, dashboard, client, agent_http, agent_grpc = free_ports(5)
    folder = Path(tempfile.mkdtemp(prefix="rr", dir="/tmp"))  # short: a socket's path may have 107 characters
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
        *(f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        *(f"--dashboard-agent-listen-port={agent_http}", f"--dashboard-agent-grpc-port={agent_grpc}"),
        *("--num-cpus=4", f"--object-store-memory={100 * 2**20}", f"--temp-dir={folder}", "--disable-usage-stats"),
    ]
    token, log = folder / "token", (folder / "start.log").open("w")
    token.write_text(uuid.uuid4().hex)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where a job finds its python
    environment = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
    address = f"http://127.0.0.1:{dashboard}"
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    try:
        wait_for_job_server(address, process, folder / "start.log")
        yield address
    finally:
        patch.undo()
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.send_signal(signal.SIGTERM)  # --block: the head takes its daemons with it
        _, alive = psutil.wait_procs(family, timeout=10)
        for left in alive:
            left.kill()
        process.wait(timeout=10)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_job_server(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            submit.connect(address).list_jobs()
            return
        except (EnvironmentProblem, RuntimeError):
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def run_on(head: str, folder: Path, *command: str) -> tuple[int, str]:
    client, output = submit.connect(head), []
    job_id = submit.start(client, command, working_dir=folder, name=f"test-{time.monotonic_ns()}", env={"GREETING": "hello"})
    return submit.Follower(client, job_id, output.append).run(), "".join(output)


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """What a job ships: the package, the quick start, and a module of the user's own."""
    own, folder = tmp_path / "my_task.py", tmp_path / "staged"
    own.write_text("answer = 42\n")
    folder.mkdir()
    submit.stage(folder, ROOT / "jobs" / "quickstart.yaml", [own])
    return folder


@pytest.mark.slow
def test_a_job_runs_the_shipped_package_and_its_output_and_exit_code_come_back(head: str, staged: Path) -> None:
    program = (
        "import os, reasoner_ray, my_task; from pathlib import Path; from reasoner_ray.submit import load_config;"
        "print(os.environ['GREETING'], my_task.answer, Path(reasoner_ray.__file__).parent.parent == Path.cwd(),"
        "load_config('jobs/quickstart.yaml', ['seed=7']).seed); raise SystemExit(3)"
    )
    code, output = run_on(head, staged, sys.executable, "-c", program)
    assert code == 3, output
    assert "hello 42 True 7" in output


@pytest.mark.slow
def test_ctrl_c_stops_the_job_and_waits_for_its_checkpoint(head: str, tmp_path: Path) -> None:
    """The job needs longer than Ray's usual three seconds of grace to write its checkpoint."""
    marker, folder = tmp_path / "checkpoint", tmp_path / "job"
    folder.mkdir()
    (folder / "job.py").write_text(
        "import signal, sys, time\n"
        f"def stop(*_): print('stopping', flush=True); time.sleep(4); open({str(marker)!r}, 'w').close(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('running', flush=True)\ntime.sleep(300)\n"
    )
    follower = (
        "import sys; from pathlib import Path; from reasoner_ray import submit\n"
        f"client = submit.connect({head!r})\n"
        f"job = submit.start(client, [{sys.executable!r}, 'job.py'], working_dir=Path({str(folder)!r}), name='interrupted')\n"
        "sys.exit(submit.Follower(client, job).run())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", follower], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any("running" in line for line in lines)
    process.send_signal(signal.SIGINT)
    output = "".join(lines)
    assert process.wait(timeout=30) == 130, output
    assert marker.exists(), output
    assert "stopping" in output
    assert "interrupted has stopped" in output
    assert submit.connect(head).get_job_status("interrupted").value == "STOPPED"


@pytest.mark.long
def test_a_submitted_job_trains_stops_at_ctrl_c_and_goes_on(
    head: str, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way of `reasoner submit`, with a reward of the user's own; stopped in mid-run and resumed to its end."""
    file, own = job(tmp_path, tiny_model_dir, steps=1000, checkpoint_every=0, eval_tasks=0), tmp_path / "reward_of_the_test.py"
    command = [sys.executable, "-m", "reasoner_ray.cli", "submit", str(file), f"--address={head}", f"--include={own}"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        wait_for_a_step(tmp_path / "run" / "metrics.jsonl", process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "it checkpoints first" in output
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    reached = read_driver_state(checkpoint)["step"]
    assert reached >= 1
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert submit.submit(file, [f"trainer.steps={reached + 1}"], address=head, if_exists="resume", include=[own]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "reward/mean" in line]
    assert steps == list(range(1, reached + 2))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def wait_for_a_step(metrics: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not (metrics.exists() and "reward/mean" in metrics.read_text()):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.1)


@pytest.mark.slow
def test_a_cluster_that_wants_another_token(head: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 32)
    with pytest.raises(EnvironmentProblem, match="refuses this machine's: set RAY_AUTH_TOKEN"):
        submit.connect(head)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(EnvironmentProblem, match="wants a Ray token: set RAY_AUTH_TOKEN"):
        submit.connect(head)


def test_an_address_that_does_not_answer() -> None:
    (port,) = free_ports(1)
    with pytest.raises(EnvironmentProblem, match=r"no Ray job server answers at .*ray start --head"):
        submit.connect(f"127.0.0.1:{port}")
    with pytest.raises(EnvironmentProblem, match="the address of Ray's dashboard"):
        submit.connect("ray://127.0.0.1:10001")


def test_a_relative_run_folder_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ConfigError, match="out: runs is relative"):
        submit.submit(ROOT / "jobs" / "quickstart.yaml", ["out=runs"], address="127.0.0.1:1")


def test_only_what_a_job_needs_is_shipped(staged: Path) -> None:
    assert sorted(p.name for p in staged.iterdir()) == ["jobs", "my_task.py", "reasoner_ray"]
    assert [p.name for p in (staged / "jobs").iterdir()] == ["quickstart.yaml"]
    assert not list(staged.rglob("__pycache__"))


def test_large_and_missing_files_are_refused(tmp_path: Path) -> None:
    data, first, second = tmp_path / "data.bin", tmp_path / "a", tmp_path / "b"
    data.touch()
    os.truncate(data, (submit.MAX_SHIPPED_MB + 1) * 2**20)
    first.mkdir()
    second.mkdir()
    with pytest.raises(ConfigError, match=r"more than 50 MB \(data\.bin 51 MB"):
        submit.stage(first, ROOT / "jobs" / "quickstart.yaml", [data])
    with pytest.raises(ConfigError, match="no such file"):
        submit.stage(second, ROOT / "jobs" / "quickstart.yaml", [tmp_path / "nothing.py"])
