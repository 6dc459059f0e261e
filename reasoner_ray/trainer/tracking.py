"""One writer for everything a run reports: ``metrics.jsonl``, W&B, the terminal, sample rollouts, events."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from reasoner_ray.config import JobConfig
from reasoner_ray.trainer.checkpoint import list_checkpoints
from reasoner_ray.trainer.metrics_log import METRICS_FILE, MetricsLog, append_jsonl, cut_jsonl
from reasoner_ray.trainer.terminal import Level, SampleRow, clock, make_view

__all__ = ["SampleRow", "Tracker"]

SAMPLES_FILE = "samples.jsonl"
GROUPS_FILE = "groups.jsonl"
VIDEOS_FOLDER = "videos"
EVENTS_FILE = "events.jsonl"
EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}
MINUTES = "time/minutes"
"""Minutes the run has been going, over all its sessions; the time between sessions does not count."""


class Tracker:
    """The one place a run's figures go through. Every method returns at once; W&B works in its own thread.

    ``metrics.jsonl`` has one line a step and is the record; a training step never fails because of W&B or the
    terminal. Metric names are flat (``reward/mean``); ``faults/*`` are totals since the run began.
    """

    def __init__(self, config: JobConfig, run_dir: Path, resume: bool) -> None:
        """``resume`` keeps what the folder has recorded. Raises ``EnvironmentProblem`` where W&B must be online and nobody is logged in."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._config, self._run_dir, self._resume = config, run_dir, resume
        self._metrics = MetricsLog(run_dir / METRICS_FILE)
        self._lock = threading.RLock()
        self._disk_full = False
        self._first_eval: float | None = None
        self._last_eval: float | None = None
        self._minutes_before = 0.0
        self._began = time.monotonic()
        self._finished = False
        self._total = config.trainer.steps
        model = config.model.path.rsplit("/", 1)[-1]
        what = f"{config.algorithm.name} on {config.task.name}" if config.kind == "rl" else config.kind
        what = f"{config.mat.variant} on {config.multi_agent.name}" if config.kind == "mat" else what
        what = f"{config.sequence.variant} on {config.sequence.world.id}" if config.kind == "sequence" else what
        self._view = make_view(config.tracking.terminal, f"{config.name}: {what}, {model}")
        self._wandb = None
        if config.tracking.wandb != "off":
            from reasoner_ray.trainer.wandb_writer import WandbWriter  # a second of import

            self._wandb = WandbWriter(
                mode=config.tracking.wandb,
                project=config.tracking.project,
                name=config.name,
                run_dir=run_dir,
                config=config.model_dump(mode="json"),
                event=self.event,
            )

    def start(self, total_steps: int, step: int) -> None:
        """Begin, or go on after ``step`` (0: from the beginning). Raises ``DataError`` where the old record is broken."""
        self._total = total_steps
        kept = self._cut(step if self._resume else -1)
        self._minutes_before = kept[-1].get(MINUTES, 0.0) if kept else 0.0
        self._began = time.monotonic()
        evals = [r["eval/accuracy"] for r in kept if r.get("eval/accuracy") is not None]
        self._first_eval, self._last_eval = (evals[0], evals[-1]) if evals else (None, None)
        self._view.start(total_steps, step)
        if self._wandb is not None:
            self._wandb.start(kept)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A training step's metrics. Raises ``ValueError`` for a step before the newest one."""
        self._record(step, metrics)
        self._view.update(step, metrics)

    def eval(self, step: int, metrics: dict[str, float]) -> None:
        """An evaluation after ``step``; it joins the step's line."""
        self._record(step, metrics)
        self._view.evaluated(step, metrics)
        accuracy = metrics.get("eval/accuracy")
        self._first_eval = accuracy if self._first_eval is None else self._first_eval
        self._last_eval = accuracy

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Sample rollouts of ``step``; ``tracking.sample_rows`` of them, spread over ``rows``, are kept."""
        wanted = self._config.tracking.sample_rows
        chosen = rows[:: max(1, len(rows) // wanted)][:wanted] if wanted else []
        if not chosen:
            return
        records = [{"step": step, **asdict(row), "gold": _plain(row.gold)} for row in chosen]
        self._save(lambda: append_jsonl(self._run_dir / SAMPLES_FILE, records))
        self._view.samples(step, chosen)
        if self._wandb is not None:
            columns = ["step", "prompt", "answer", "reward", "status", "gold"]
            self._wandb.put_table(step, "samples", columns, [[step, r.prompt, r.answer, r.reward, r.status, str(r.gold)] for r in chosen])

    def video(self, step: int, name: str, file: str, content: bytes) -> None:
        """An episode of ``step``, kept as ``videos/FILE`` and shown in W&B as ``name``; ``content`` is a GIF or MP4, as ``file`` ends."""
        path = self._run_dir / VIDEOS_FOLDER / file

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

        self._save(write)
        if self._wandb is not None and path.is_file():
            self._wandb.put_video(step, name, path)

    def groups(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """The groups that ``step`` was trained on, a line each in ``groups.jsonl``: every group of the run is there once."""
        self._save(lambda: append_jsonl(self._run_dir / GROUPS_FILE, [{"step": step, **row} for row in rows]))

    def event(self, text: str, level: Level) -> None:
        """Something worth telling (an engine restarted); kept in ``events.jsonl``. Safe from any thread."""
        with self._lock:
            record = {"step": self._metrics.last.get("step", 0), "time": time.time(), "level": level, "text": text}
            self._save(lambda: append_jsonl(self._run_dir / EVENTS_FILE, [record]))
            self._view.event(text, level)

    def rewind(self, step: int) -> None:
        """The run went back to ``step`` (a learner restarted from a checkpoint): what came after it is recorded anew."""
        self._cut(step)
        self._view.rewound(step)

    def finish(self, status: Literal["finished", "interrupted", "failed"]) -> None:
        """Close everything and say where things are. A second call does nothing."""
        if self._finished:
            return
        self._finished = True
        took = clock(60 * self._minutes())
        where = self._wandb.finish(EXIT_CODES[status]) if self._wandb is not None else "off"
        folder = shlex.quote(str(self._run_dir))
        accuracy = ""
        if self._first_eval is not None and self._last_eval is not None:
            accuracy = f", eval accuracy {self._first_eval:.1%} -> {self._last_eval:.1%}"
        step = self._metrics.last.get("step", 0)
        self._view.finish(
            [
                f"{status} after {step} of {self._total} steps in {took}{accuracy}",
                f"  metrics  {folder}/{METRICS_FILE} (samples.jsonl, groups.jsonl and events.jsonl beside it)",
                f"  W&B      {where}",
                f"  curves   reasoner plot {folder}",
                *([f"  model    {folder}/model"] if status == "finished" else []),
                *(
                    [f"  go on    reasoner train {folder}/config.yaml --resume"]
                    if status != "finished" and list_checkpoints(self._run_dir)
                    else []
                ),
            ]
        )

    def _cut(self, step: int) -> list[dict[str, Any]]:
        """Forget what was recorded after ``step``; returns the metrics that stay."""
        for name in (SAMPLES_FILE, GROUPS_FILE):
            cut_jsonl(self._run_dir / name, step)
        return self._metrics.cut(step)

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        values = {k: float(v) for k, v in metrics.items()}
        stamped = {"time": time.time(), MINUTES: round(self._minutes(), 4), **values}
        self._save(lambda: self._metrics.put(step, stamped))
        if self._wandb is not None:
            self._wandb.put(step, values | {MINUTES: stamped[MINUTES]})

    def _minutes(self) -> float:
        return self._minutes_before + (time.monotonic() - self._began) / 60

    def _save(self, write: Callable[[], None]) -> None:
        """Write; a full disk is told once and does not end the run (metrics are kept and written when there is room)."""
        try:
            write()
        except OSError as error:
            if not self._disk_full:
                self._view.event(f"cannot write to {self._run_dir}: {error.strerror}; training goes on", "error")
            self._disk_full = True
        else:
            self._disk_full = False


def _plain(value: Any) -> Any:
    """``value`` where JSON can hold it, else its text."""
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
