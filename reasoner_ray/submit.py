"""Submit a job to a Ray cluster, follow its output, and stop it cleanly on Ctrl-C (Ray's job API)."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from reasoner_ray import settings
from reasoner_ray.config import load_config, load_tree
from reasoner_ray.errors import ConfigError, EnvironmentProblem
from reasoner_ray.yaml_text import write_yaml

MAX_SHIPPED_MB = 50
"""Ray keeps what a job ships in the memory of the head node; a data set or a model does not belong there."""
STOP_SECONDS = 600
"""How long a job asked to stop may take before Ray kills it: the phase under way (a 7B learning step), then the checkpoint."""
RECONNECTS = 15
"""Tries, two seconds apart, before a head node that fell silent is given up."""
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", ".git", ".venv", "*.egg-info", ".*_cache", "runs", "wandb")


def submit(
    job: Path,
    overrides: Sequence[str],
    *,
    address: str,
    if_exists: str = "error",
    include: Sequence[Path] = (),
    env: Mapping[str, str] | None = None,
    python: str = "python",
    follow: bool = True,
) -> int:
    """Run ``reasoner train JOB OVERRIDES`` on the cluster whose dashboard answers at ``address``.

    Ships this package, the job's YAML and what ``include`` names (a user's own modules, put beside the package), so that the
    nodes need only the locked requirements. ``env`` is set in the job and in all its actors. ``python`` is the interpreter's
    name on the cluster. Returns the exit code for the command line: the job's own, 130 after Ctrl-C, 0 where it is not followed.

    Raises ``ConfigError`` for a job that cannot run and ``EnvironmentProblem`` where no Ray answers.
    """
    config = load_config(job, list(overrides))
    if not config.out.is_absolute():
        raise ConfigError(
            f"out: {config.out} is relative, and the folder a submitted job runs in is deleted with it; "
            "name a folder that every node sees, for example out=/shared/runs"
        )
    client = connect(address)
    name = f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with tempfile.TemporaryDirectory(prefix="reasoner-submit-") as folder:
        stage(Path(folder), job, include)
        command = [python, "-m", "reasoner_ray.cli", "train", f"jobs/{job.name}", *overrides, "--if-exists", if_exists]
        job_id = start(client, command, working_dir=Path(folder), name=name, env=env)
    print(f"submitted {job_id} to {address}", file=sys.stderr)
    if not follow:
        print(f"follow it with: ray job logs --follow --address {address} {job_id}", file=sys.stderr)
        return 0
    return Follower(client, job_id).run()


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server at ``address`` (``http://HOST:8265`` or ``HOST:8265``). Raises ``EnvironmentProblem``."""
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EnvironmentProblem(f"--address {address}: give the address of Ray's dashboard, for example http://127.0.0.1:8265")
    answer = f"no Ray job server answers at {url}; start one with `ray start --head` (its dashboard listens on port 8265)"
    try:
        # Asked for first because Ray's client waits for minutes where packets are dropped.
        socket.create_connection((parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), timeout=10).close()
        return _authenticated(url)
    except (OSError, RuntimeError, ValueError, requests.RequestException) as error:
        raise EnvironmentProblem(f"{answer}: {error}") from error


def _authenticated(url: str) -> JobSubmissionClient:
    """A client that shows the user's token where the server wants one.

    Ray 2.60 turns tokens on by itself in a cluster that is started where ``~/.ray/auth_token`` exists (any local ``ray.init``
    writes it), but its job client shows the token only where ``RAY_AUTH_MODE=token`` is set as well.
    """
    try:
        return JobSubmissionClient(url)
    except AuthenticationError as error:
        wanted = f"{url} wants a Ray token"
        token = settings.ray_token()
        if token is None:
            raise EnvironmentProblem(f"{wanted}: set RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head node") from error
        try:
            return JobSubmissionClient(url, headers={"Authorization": f"Bearer {token}"})
        except AuthenticationError as refused:
            raise EnvironmentProblem(
                f"{wanted} and refuses this machine's: set RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head node"
            ) from refused


def stage(folder: Path, job: Path, include: Sequence[Path] = ()) -> None:
    """Copy into ``folder`` what a job ships: the package, ``jobs/JOB.yaml``, and the files and folders of ``include``.

    Raises ``ConfigError`` where one of them is missing or all are larger than ``MAX_SHIPPED_MB``.
    """
    package = Path(__file__).parent
    for source in (package, *include):
        if source.is_dir():
            shutil.copytree(source, folder / source.resolve().name, ignore=NOT_SHIPPED)
        elif source.is_file():
            shutil.copy2(source, folder / source.name)
        else:
            raise ConfigError(f"--include {source}: no such file or folder")
    (folder / "jobs").mkdir(exist_ok=True)
    (folder / "jobs" / job.name).write_text(write_yaml(load_tree(job)))  # the files it extends stay here
    sizes = {file.relative_to(folder): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    if sum(sizes.values()) > MAX_SHIPPED_MB * 2**20:
        largest = ", ".join(f"{file} {sizes[file] / 2**20:.0f} MB" for file in sorted(sizes, key=lambda f: -sizes[f])[:3])
        raise ConfigError(f"the job would ship more than {MAX_SHIPPED_MB} MB ({largest}); put data where every node sees it")


def start(
    client: JobSubmissionClient, command: Sequence[str], *, working_dir: Path, name: str, env: Mapping[str, str] | None = None
) -> str:
    """Start ``command`` in a copy of ``working_dir`` on the cluster; returns the job's id."""
    # The supervisor sends SIGTERM and kills after three seconds; a checkpoint takes longer. `exec`: no shell takes the signal.
    env_vars = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **(env or {})}
    try:
        return client.submit_job(
            entrypoint=f"exec {shlex.join(command)}",
            submission_id=name,
            runtime_env={"working_dir": str(working_dir), "env_vars": env_vars},
        )
    except (RuntimeError, requests.RequestException) as error:
        raise EnvironmentProblem(f"Ray did not take the job: {error}") from error


class Follower:
    """Prints a job's output until it ends; Ctrl-C asks Ray to stop the job and waits until it has."""

    def __init__(self, client: JobSubmissionClient, job_id: str, write: Callable[[str], object] = sys.stdout.write) -> None:
        self._client = client
        self._job_id = job_id
        self._write = write
        self._printed = 0  # characters of the log

    def run(self) -> int:
        """Returns the job's exit code, 130 where it was stopped by Ctrl-C."""
        try:
            asyncio.run(self._follow())
        except KeyboardInterrupt:
            print(f"\nstopping {self._job_id}: it checkpoints first (Ctrl-C again to leave it to Ray)", file=sys.stderr, flush=True)
            self._client.stop_job(self._job_id)
            asyncio.run(self._follow())
            print(f"{self._job_id} has stopped", file=sys.stderr)
            return 130
        details = self._client.get_job_info(self._job_id)
        if details.status == JobStatus.SUCCEEDED:
            return 0
        print(f"{self._job_id}: {details.status.value.lower()}: {details.message}", file=sys.stderr)
        return details.driver_exit_code or 1

    async def _follow(self) -> None:
        """Print what the job writes until it has ended; a connection that breaks is made again."""
        silent = 0
        while silent < RECONNECTS:
            try:
                await self._print_log()
                if self._client.get_job_status(self._job_id).is_terminal():
                    return
                silent = 0
            except (RuntimeError, aiohttp.ClientError, requests.RequestException):
                silent += 1
            await asyncio.sleep(2)
        raise EnvironmentProblem(
            f"Ray has not answered for {2 * RECONNECTS} seconds; the job may still be running: "
            f"ray job status --address {self._client.get_address()} {self._job_id}"
        )

    async def _print_log(self) -> None:
        seen = 0  # each connection starts at the log's first character
        async for text in self._client.tail_job_logs(self._job_id):
            fresh = text[max(0, self._printed - seen) :]
            seen += len(text)
            if fresh:
                self._write(fresh)
                sys.stdout.flush()
                self._printed = seen
