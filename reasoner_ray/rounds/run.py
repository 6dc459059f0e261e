"""``reasoner train`` of ``kind: rounds``: the phases of each round one after the other, none of them twice.

Every phase is a run of `reasoner search`, `train` or `label` in a folder of its own. RUN/phases.jsonl has a line for each that has
ended, RUN/metrics.jsonl one for each round. A job that was killed goes on at the phase that was broken off, and inside it where its
own run can go on.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.errors import CheckpointError, ConfigError, DataError
from reasoner_ray.labels.launch import FOLDER as LABELS
from reasoner_ray.labels.launch import label
from reasoner_ray.labels.store import JOURNAL
from reasoner_ray.models import resolve_model
from reasoner_ray.prm.examples import read_examples
from reasoner_ray.rounds.data import gather
from reasoner_ray.rounds.figures import figures_of
from reasoner_ray.rounds.plan import Phase, Work, model_after, plan
from reasoner_ray.search.run import FOLDER as SEARCH
from reasoner_ray.search.run import search
from reasoner_ray.trainer import launch
from reasoner_ray.trainer.checkpoint import list_checkpoints
from reasoner_ray.trainer.metrics_log import METRICS_FILE, append_jsonl, cut_jsonl, read_jsonl
from reasoner_ray.trainer.supervised import kind_of
from reasoner_ray.trainer.terminal import clock
from reasoner_ray.trainer.tracking import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.data.tasks import Task

LEDGER = "phases.jsonl"
MAY_CHANGE = ("name", "out", "tracking", "cluster")
"""Sections that may differ where a job goes on; and there may be more rounds."""
TOLD = ("accuracy", "tokens", "any_right", "loss", "auc", "correlation", "gap", "labels")
"""Figures that a phase's line shows."""
Workers = Mapping[Work, Callable[[JobConfig, Literal["error", "resume", "overwrite"]], Any]]


def train(config: JobConfig, if_exists: launch.IfExists = "error") -> dict[str, float]:
    """Run the rounds to the end and return the last one's figures. RUN/model and RUN/judge are what it leaves.

    Raises ``ReasonerError`` with what to do, and ``KeyboardInterrupt`` where it was asked to stop.
    """
    complete, task, tokenizer = launch.load_task(config)
    check_questions(complete, task, tokenizer)
    config = choose_run(config, if_exists)
    launch.make_run_folder(config, if_exists)
    view: Any = "off" if config.tracking.terminal == "off" else "plain"  # a live view would lie over those of the phases
    plain = config.model_copy(update={"tracking": config.tracking.model_copy(update={"terminal": view})})
    tracker = Tracker(plain, config.run_dir, resume=if_exists == "resume")
    status: Literal["finished", "interrupted", "failed"] = "failed"
    try:
        figures = run_rounds(config, tracker, {"search": search, "train": launch.train, "label": label})
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        tracker.event(f"go on with: reasoner train {config.run_dir / 'config.yaml'} --resume", "info")
        raise
    finally:
        tracker.finish(status)
    return figures


def choose_run(config: JobConfig, if_exists: launch.IfExists) -> JobConfig:
    """The job, renamed where a new run was asked for. Raises ``ReasonerError`` where its folder is another job's, or there is none."""
    if if_exists != "resume":
        return launch.choose_run(config, if_exists)[0]
    file = config.run_dir / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"nothing to resume: {file} does not exist")
    before, now = (job.model_dump(mode="json", exclude={"rounds": {"n"}}) for job in (load_config(file), config))
    if before["kind"] != "rounds":
        raise ConfigError(f"{config.run_dir} holds a job of kind {before['kind']}; set another name=..., or take --overwrite")
    different = [key for key in now if key not in MAY_CHANGE and now[key] != before[key]]
    if different:
        raise ConfigError(
            f"{config.run_dir} was made with another {', '.join(different)}; go on with its own settings (reasoner train {file} --resume), "
            "or set another name=..."
        )
    return config


def check_questions(config: JobConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ``DataError`` where a held-out question is among those that are learnt from, of the task or of files."""
    held_out = {tuple(task.render(item, tokenizer)): item.id for item in task.held_out()[: config.search.items]}
    if not held_out:
        raise DataError(f"task {task.name} has no held-out questions to evaluate rounds on")
    learnt = [(f"training item {item.id}", tuple(task.render(item, tokenizer))) for item in task.train()]
    for phase in plan(config, 1):
        files = [name for name in phase.extra if name != "task"]
        if files:
            examples, _ = read_examples(files, kind_of(phase.config), phase.config.supervised, tokenizer)
            learnt += [(example.where, example.partial.prompt) for example in examples]
    for where, prompt in learnt:
        if prompt in held_out:
            raise DataError(f"{where} is also held-out item {held_out[prompt]}: a question is learnt from or evaluated on, never both")


def run_rounds(config: JobConfig, tracker: Tracker, workers: Workers) -> dict[str, float]:
    """What ``train`` does once the folder is there; ``workers`` run the phases."""
    ledger = config.run_dir / LEDGER
    ended = {(record["step"], record["phase"]): record["figures"] for record in cut_jsonl(ledger, sys.maxsize)}
    metrics = config.run_dir / METRICS_FILE
    told = max((record["step"] for record in read_jsonl(metrics)), default=-1) if metrics.exists() else -1
    told = min(told, config.rounds.n)  # with fewer rounds than before, those are the record
    tracker.start(config.rounds.n, max(told, 0))
    figures: dict[str, float] = {}
    for number in range(config.rounds.n + 1):
        figures = {}
        for phase in plan(config, number):
            name = f"round {number}/{config.rounds.n}, {phase.name}"
            if (number, phase.name) not in ended:
                tracker.event(f"{name} ...", "info")
                began = time.monotonic()
                found = run_phase(phase, workers, right_from=config.rounds.right_from, keep=config.rounds.keep)
                took = time.monotonic() - began
                found[f"time/{phase.name}_minutes"] = took / 60
                append_jsonl(ledger, [{"step": number, "phase": phase.name, "figures": found}])
                shutil.rmtree(phase.config.run_dir / "checkpoints", ignore_errors=True)  # nothing goes on from them any more
                tracker.event(f"{name}: {clock(took)}{_told(found)}", "info")
                ended[number, phase.name] = found
            figures |= ended[number, phase.name]
        if number > told:
            tracker.log(number, figures)
            tracker.eval(number, figures)
    _point(config.run_dir / "model", model_after(config, config.rounds.n, "policy"))
    _point(config.run_dir / "judge", model_after(config, config.rounds.n, "judge"))
    return figures


def run_phase(phase: Phase, workers: Workers, *, right_from: float, keep: int | None) -> dict[str, float]:
    """One phase to its end, from where it was broken off; its figures."""
    found: dict[str, float] = {}
    if phase.sources:
        kind: Literal["sft", "value"] = "sft" if phase.config.kind == "sft" else "value"
        counts = gather(phase.sources, phase.learns, kind, right_from=right_from, keep=keep)
        found = {f"{phase.name}/{key}": value for key, value in counts.items()}
    workers[phase.work](phase.config, how_to_begin(phase))
    return found | figures_of(phase)


def how_to_begin(phase: Phase) -> Literal["error", "resume", "overwrite"]:
    """Go on where the phase's folder holds something to go on from, else begin anew."""
    folder = phase.config.run_dir
    begun = {
        "train": lambda: bool(list_checkpoints(folder)),
        "search": lambda: (folder / SEARCH / "config.yaml").is_file(),
        "label": lambda: (folder / LABELS / JOURNAL).is_file(),
    }
    return "resume" if begun[phase.work]() else "overwrite"


def _told(figures: Mapping[str, float]) -> str:
    shown: Sequence[str] = [f"{key} {value:.4g}" for key, value in figures.items() if key.split("/")[-1] in TOLD]
    return " | " + ", ".join(shown) if shown else ""


def _point(link: Path, model: str) -> None:
    """Let ``link`` lead to a model's folder; the run's folder may be moved."""
    link.unlink(missing_ok=True)
    target, home = resolve_model(model).resolve(), link.parent.resolve()
    link.symlink_to(target.relative_to(home) if target.is_relative_to(home) else target, target_is_directory=True)
