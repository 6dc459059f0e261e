"""Learning curves of one or several runs as one PNG: ``reasoner plot RUN...``."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reasoner_ray.errors import DataError
from reasoner_ray.trainer.metrics_log import METRICS_FILE, read_jsonl

log = logging.getLogger(__name__)

XAxis = Literal["steps", "minutes", "actions"]
X_KEYS: dict[XAxis, str] = {"steps": "step", "minutes": "time/minutes", "actions": "episode/actions_in_all"}
X_LABELS: dict[XAxis, str] = {"steps": "training steps", "minutes": "minutes of training", "actions": "environment steps"}
DEFAULT_METRICS = (
    "reward/mean",
    "eval/accuracy",
    "episode/return",
    "eval/return",
    "eval/success",
    "eval/stop_rate",
    "eval/correct_stops",
    "eval/wrong_stops",
    "eval/steps",
    "eval/distance",
    "mismatch/k3",
    "learner/entropy",
    "rollout/tokens_per_s",
    "learner/tokens_per_s",
)
"""Drawn where nothing is asked for and a run has them."""
LOG_SCALE = ("mismatch/",)
"""Metrics that live on orders of magnitude."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's palette: told apart by colour-blind readers too."""
SEED_SUFFIX = re.compile(r"[-_./](?:seed|s)[-_]?\d+$")
"""``NAME-seed0``, ``NAME_s1``, ``NAME/seed2``."""
NOT_THE_EXPERIMENT = ("seed", "name", "out", "tracking", "cluster")
"""Keys of a configuration in which the seeds of one experiment may differ."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run's record. ``experiment`` is equal for runs that differ in the seed alone."""

    path: Path
    records: list[dict[str, Any]]
    experiment: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    def series(self, metric: str, x: XAxis) -> tuple[np.ndarray, np.ndarray]:
        """``(x[n], y[n])`` of the records that hold both."""
        key = X_KEYS[x]
        points = [(r[key], r[metric]) for r in self.records if _is_number(r.get(metric)) and _is_number(r.get(key))]
        array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]


def plot_runs(
    runs: Sequence[Path], out: Path, metrics: Sequence[str] | None = None, smooth: int = 1, x: XAxis = "steps", title: str | None = None
) -> list[str]:
    """Draw one panel a metric into ``out`` and return the metrics drawn.

    Runs that differ in their seed alone are one curve: the mean, with the range from the lowest to the highest as a
    band, over the part that all of them have reached; the band of a single run is the
    metric's own interval (``METRIC_low``, ``METRIC_high``), where it has one. ``smooth`` is the window (in points) of a
    running mean over training metrics; evaluations are never smoothed.

    Raises ``DataError`` for a folder without metrics, a broken line (with file and line) and an unknown metric.
    """
    if smooth < 1:
        raise DataError(f"the smoothing window is a number of points, at least 1, not {smooth}")
    loaded = [load_run(Path(path)) for path in runs]
    if not loaded:
        raise DataError("no run to plot; give the folders of one or several runs")
    chosen = _choose_metrics(loaded, metrics)
    groups = group_seeds(loaded)
    columns = min(2 if len(chosen) <= 4 else 3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows + 0.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)  # no display, no global state
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for panel, metric in zip(panels, chosen, strict=False):
        _draw_panel(panel, metric, groups, smooth, x)
    for panel in panels[len(chosen) :]:
        panel.set_axis_off()
    _legend(figure, panels, groups)
    if title:
        figure.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return chosen


def load_run(path: Path) -> Run:
    """Read a run's folder. Raises ``DataError``."""
    file = path / METRICS_FILE
    if not file.is_file():
        inside = sorted(str(f.parent) for f in path.glob(f"*/{METRICS_FILE}"))
        if inside:
            raise DataError(f"{path} is not a run, but holds {len(inside)}; plot them with: reasoner plot {' '.join(inside)}")
        raise DataError(f"no {METRICS_FILE} in {path}; give the folder of a run, for example runs/quickstart")
    records = read_jsonl(file)
    if not records:
        raise DataError(f"{file} has no step yet")
    return Run(path, records, _experiment(path))


def group_seeds(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Label -> the seeds of one experiment, in the order given."""
    experiments: dict[str, list[Run]] = {}
    for run in runs:
        experiments.setdefault(run.experiment, []).append(run)
    groups: dict[str, list[Run]] = {}
    for members in experiments.values():
        common = Path(SEED_SUFFIX.sub("", str(members[0].path.resolve()))).name
        label = members[0].name if len(members) == 1 else f"{common} ({len(members)} seeds)"
        if label in groups:  # the same folder name in two places
            label = f"{members[0].path.parent.name}/{label}"
        groups[label if label not in groups else str(members[0].path)] = members
    return groups


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values at each point (of as many as there are, at the beginning)."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    return (total[end] - total[begin]) / (end - begin)


def _experiment(path: Path) -> str:
    """What the seeds of one experiment have in common: the configuration without its seed, else the name without it."""
    file = path / "config.yaml"
    if not file.is_file():
        return SEED_SUFFIX.sub("", str(path.resolve()))
    try:
        tree = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise DataError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise DataError(f"{file} must hold a mapping of sections, not a {type(tree).__name__}")
    return json.dumps({k: v for k, v in tree.items() if k not in NOT_THE_EXPERIMENT}, sort_keys=True, default=str)


def _choose_metrics(runs: Sequence[Run], wanted: Sequence[str] | None) -> list[str]:
    known = sorted({k for run in runs for r in run.records for k, v in r.items() if _is_number(v)} - {"step", "time"})
    if not wanted:
        chosen = [m for m in DEFAULT_METRICS if m in known] or known[:9]
        if not chosen:
            raise DataError(f"{runs[0].path / METRICS_FILE} holds no metric to draw")
        return chosen
    for metric in wanted:
        if metric not in known:
            near = difflib.get_close_matches(metric, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise DataError(f"no metric {metric!r} in {', '.join(str(r.path) for r in runs)}; {hint}They have: {', '.join(known)}")
    return list(dict.fromkeys(wanted))


def _draw_panel(panel: Axes, metric: str, groups: dict[str, list[Run]], smooth: int, x: XAxis) -> None:
    window = 1 if metric.startswith("eval/") else smooth
    for (label, members), colour in zip(groups.items(), cycle(COLOURS), strict=False):
        series = [s for s in (run.series(metric, x) for run in members) if len(s[0])]
        if len(series) == 1:
            xs, ys = series[0]
            _draw_interval(panel, metric, members, colour, x)
            if window > 1:
                panel.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
            panel.plot(xs, running_mean(ys, window), color=colour, label=label, **_marks(len(xs)))
        elif series:
            xs, stack = _aligned([(s[0], running_mean(s[1], window)) for s in series])
            panel.fill_between(xs, stack.min(0), stack.max(0), color=colour, alpha=0.2, linewidth=0)
            panel.plot(xs, stack.mean(0), color=colour, label=label, **_marks(len(xs) if x == "steps" else len(series[0][0])))
    panel.set_title(metric, fontsize=10)
    panel.set_xlabel(X_LABELS[x], fontsize=9)
    panel.tick_params(which="both", labelsize=8)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    heights = np.concatenate([np.asarray(line.get_ydata()) for line in panel.lines] or [np.empty(0)])
    if metric.startswith(LOG_SCALE) and len(np.unique(heights)) > 1 and heights.min() > 0:
        panel.set_yscale("log")


def _draw_interval(panel: Axes, metric: str, members: Sequence[Run], colour: str, x: XAxis) -> None:
    """The interval of a metric that has one (``METRIC_low``, ``METRIC_high``)."""
    for run in members:
        (xs, low), (_, high) = run.series(f"{metric}_low", x), run.series(f"{metric}_high", x)
        if len(xs) and len(low) == len(high):
            panel.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def _aligned(series: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """All curves at the same places, between the latest beginning and the earliest end: ``x[n], y[curves, n]``."""
    low, high = max(xs[0] for xs, _ in series), min(xs[-1] for xs, _ in series)
    if low > high:
        return np.empty(0), np.empty((len(series), 0))
    places = np.unique(np.concatenate([[low, high], *(xs for xs, _ in series)]))
    places = places[(places >= low) & (places <= high)]
    return places, np.stack([np.interp(places, xs, ys) for xs, ys in series])


def _marks(points: int) -> dict[str, Any]:
    """Few points are shown as points."""
    return {"linewidth": 1.6} | ({"marker": "o", "markersize": 3.5} if points <= 12 else {})


def _legend(figure: Figure, panels: np.ndarray, groups: dict[str, list[Run]]) -> None:
    handles = {line.get_label(): line for panel in panels for line in panel.lines if line.get_label() in groups}
    for label in groups:
        if label not in handles:
            log.warning("%s has none of the metrics drawn", label)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, max(len(handles), 1)), frameon=False, fontsize=9
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
