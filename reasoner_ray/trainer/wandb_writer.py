"""W&B in a thread of its own: nothing that W&B or the network does can hold up or end a training step.

``metrics.jsonl`` is the record, W&B a view of it. Whatever W&B lacks at the start (a run that was offline before,
the last row before a kill) is filled in from that record, and a row that W&B already has is never sent again.
"""

from __future__ import annotations

import queue
import secrets
import shlex
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import wandb
from wandb.sdk.lib.asyncio_manager import AlreadyJoinedError
from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
from wandb.sdk.mailbox import HandleAbandonedError
from wandb.sdk.mailbox.mailbox import MailboxClosedError
from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

from reasoner_ray.errors import EnvironmentProblem
from reasoner_ray.trainer.terminal import Level

Mode = Literal["auto", "online", "offline"]
Event = Callable[[str, Level], None]

RUN_ID_FILE = "wandb_run_id"
INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 10.0
"""Ctrl-C has to end within 30 s, checkpoint included."""
CHECK_EVERY_S = 60.0
"""Seconds between checks that the server still answers."""

# What a wandb call raises when the server, the network or wandb's own service process is gone.
WANDB_FAILURES = (
    wandb.Error,
    OSError,
    TimeoutError,
    AlreadyJoinedError,
    HandleAbandonedError,
    MailboxClosedError,
    ServerResponseError,
    WandbServiceConnectionError,
)


class Row(NamedTuple):
    """What is logged under one step."""

    step: int
    values: dict[str, Any]
    tables: dict[str, tuple[list[str], list[list[Any]]]]  # name -> (columns, rows)
    videos: dict[str, Path]  # name -> a GIF or MP4


class WandbWriter:
    """Sends rows to one W&B run, which a resumed job continues.

    ``event(text, level)`` is called from the writer's thread.
    """

    def __init__(self, *, mode: Mode, project: str, name: str, run_dir: Path, config: dict[str, Any], event: Event) -> None:
        """Raises ``EnvironmentProblem`` where ``mode`` is online and nobody is logged in."""
        self._mode: Mode = mode
        self._init = {"project": project, "name": name, "dir": str(run_dir), "config": config, "reinit": "create_new"}
        self._run_id = _run_id(run_dir / RUN_ID_FILE)
        self._event = event
        self._queue: queue.SimpleQueue[Row | int] = queue.SimpleQueue()
        self._run: Any = None
        self._online = False
        self._next_step = 0
        self._skip_noted = False
        self._answering = True
        self._checked_at = time.monotonic()
        _hush()
        if mode == "online" and not _logged_in():
            raise EnvironmentProblem(
                "tracking.wandb=online, but nobody is logged in to W&B; "
                "run `wandb login`, set WANDB_API_KEY, or take tracking.wandb=offline"
            )
        self._thread = threading.Thread(target=self._work, name="wandb-writer", daemon=True)

    def start(self, backlog: Iterable[dict[str, Any]]) -> None:
        """Open the run; rows of ``backlog`` (records with a ``step``) that it lacks are sent first."""
        for record in backlog:
            self.put(record["step"], {k: v for k, v in record.items() if k not in ("step", "time") and v is not None})
        self._thread.start()

    def put(self, step: int, values: dict[str, Any]) -> None:
        """Queue values for ``step``."""
        self._queue.put(Row(step, values, {}, {}))

    def put_table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Queue a table for ``step``."""
        self._queue.put(Row(step, {}, {name: (columns, rows)}, {}))

    def put_video(self, step: int, name: str, path: Path) -> None:
        """Queue a video file for ``step``; it must stay where it is."""
        self._queue.put(Row(step, {}, {}, {name: path}))

    def finish(self, exit_code: int) -> str:
        """Close the run; returns the line that tells where it is. Waits for the network ``FINISH_TIMEOUT_S`` at most, twice."""
        if self._thread.ident is None:
            return "not started"
        self._queue.put(exit_code)
        self._thread.join(2 * FINISH_TIMEOUT_S)
        if self._thread.is_alive():
            self._event("W&B did not close in time; metrics.jsonl holds everything", "warning")
        if self._run is None:
            return "not recorded (see the warnings above)"
        # Not plain `wandb`: the virtual environment that runs the job need not be the active one.
        sync = f"{shlex.quote(sys.executable)} -m wandb sync"
        folder = shlex.quote(self._run.settings.sync_dir)
        if not self._online:
            return f"{'offline' if self._answering else 'incomplete'}; upload with: {sync} {folder}"
        # The folder of an online run holds everything too, which matters where the server stopped answering.
        return self._run.url if self._answering else f"incomplete online; upload with: {sync} --include-online {folder}"

    def _work(self) -> None:
        try:
            self._open()
            while not isinstance(item := self._next(), int):
                self._send(item)
            self._close(item)
        except WANDB_FAILURES as error:
            self._event(f"W&B failed and is given up for this session ({_first_line(error)}); metrics.jsonl holds everything", "warning")
            self._answering = False

    def _open(self) -> None:
        mode = self._mode
        if mode == "auto":
            mode = "online" if self._is_logged_in() else "offline"
        if mode == "online":
            try:
                self._run = wandb.init(mode="online", id=self._run_id, resume="allow", settings=_settings(), **self._init)
            except WANDB_FAILURES as error:
                self._event(f"W&B cannot be reached ({_first_line(error)}); recording offline", "warning")
                wandb.teardown()  # the service keeps the failed run's id in use
                _hush()
                mode = "offline"
        if mode == "offline":
            # W&B cannot resume offline, and a later folder replaces an earlier one on `wandb sync`: so the newest
            # folder of a run gets the whole history from the backlog.
            self._run = wandb.init(mode="offline", id=self._run_id, settings=_settings(), **self._init)
        self._online = mode == "online"
        self._next_step = self._run.starting_step
        where = self._run.url if self._online else f"offline in {self._run.settings.sync_dir}"
        self._event(f"W&B: {where}", "info")

    def _is_logged_in(self) -> bool:
        try:
            return _logged_in()
        except wandb.errors.AuthenticationError as error:
            self._event(f"W&B login is not usable ({_first_line(error)}); recording offline", "warning")
            return False

    def _next(self) -> Row | int:
        """The next row, or the exit code; while there is none, look whether the server answers."""
        while True:
            wait = self._checked_at + CHECK_EVERY_S - time.monotonic()
            if wait <= 0:
                self._check_server()
            try:
                return self._queue.get(timeout=max(wait, 0.01))
            except queue.Empty:
                continue

    def _send(self, row: Row) -> None:
        if row.step < self._next_step:
            if not self._skip_noted:
                self._event(f"W&B already has steps up to {self._next_step - 1}; it goes on after them", "info")
            self._skip_noted = True
            return
        self._next_step = row.step
        tables = {name: wandb.Table(columns=columns, data=rows) for name, (columns, rows) in row.tables.items()}
        videos = {name: wandb.Video(str(path)) for name, path in row.videos.items()}
        # An explicit step: what arrives for the same step becomes one row, and no later session can go backwards.
        self._run.log({**row.values, **tables, **videos}, step=row.step)

    def _close(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            self._event("W&B did not take the last rows in time", "warning")
            self._answering = False

    def _check_server(self) -> None:
        """W&B retries in silence for days; this says once that the server went away, and once that it came back."""
        self._checked_at = time.monotonic()
        if not self._online:
            return
        problem = _unreachable(self._run.settings)
        if problem and self._answering:
            self._event(f"W&B does not answer ({problem}); training goes on, metrics.jsonl holds everything", "warning")
        if not problem and not self._answering:
            self._event("W&B answers again", "info")
        self._answering = not problem


def _run_id(path: Path) -> str:
    """The run's W&B id: kept in its folder, so that a resumed job continues the same W&B run."""
    if path.exists():
        return path.read_text().strip()
    run_id = secrets.token_hex(4)
    path.write_text(run_id + "\n")
    return run_id


def _settings() -> wandb.Settings:
    return wandb.Settings(
        silent=False,
        quiet=True,
        show_info=False,
        console="off",
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
    )


def _hush() -> None:
    """W&B's notes would tear up the progress view; its warnings and errors stay."""
    wandb.setup(settings=wandb.Settings(silent=True))  # else a login asks the server for the user's name, to print it
    wandb.termsetup(_settings(), None)


def _logged_in() -> bool:
    """Whether W&B has credentials (environment, settings, netrc); asks nobody and verifies nothing."""
    return bool(wandb.login(prompt=False, verify=False))


def _unreachable(settings: wandb.Settings) -> str:
    """Why the server does not answer, or an empty string. Any HTTP status is an answer."""
    proxies = {name: url for name, url in (("http", settings.http_proxy), ("https", settings.https_proxy)) if url}
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler(proxies)] if proxies else []))
    try:
        opener.open(settings.base_url, timeout=10).close()
    except urllib.error.HTTPError:
        return ""
    except OSError as error:  # URLError and time-outs
        return _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")
