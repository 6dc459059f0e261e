"""What a run shows on the terminal: a live view where there is one, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Level = Literal["info", "warning", "error"]
COLOURS: dict[Level, str] = {"info": "", "warning": "yellow", "error": "red"}
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
ETA_STEPS = 20
"""Steps whose mean duration predicts the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One sample rollout as people read it. ``reward`` is None where the scorer failed."""

    prompt: str
    answer: str
    reward: float | None
    status: str
    gold: Any = None


class View:
    """What the tracker tells a terminal. The base is silent but for warnings and errors, which go to stderr."""

    def start(self, total: int, step: int) -> None:
        """The run has done ``step`` of ``total`` steps."""

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """A step's training metrics."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """An evaluation's metrics."""

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """A few sample rollouts."""

    def rewound(self, step: int) -> None:
        """The run went back to ``step``."""

    def event(self, text: str, level: Level) -> None:
        """Something happened."""
        if level != "info":
            print(f"{level}: {text}", file=sys.stderr, flush=True)

    def finish(self, lines: Sequence[str]) -> None:
        """The last words."""


def make_view(kind: Literal["auto", "rich", "plain", "off"], title: str) -> View:
    """``auto``: the live view on a terminal, plain lines in a file or a pipe."""
    if kind == "off":
        return View()
    if kind == "rich" or (kind == "auto" and sys.stdout.isatty()):
        return RichView(title, Console(force_terminal=True if kind == "rich" else None))
    return PlainView()


@dataclass
class Pace:
    """Progress and the time that is left."""

    total: int = 0
    step: int = 0
    began: float = field(default_factory=time.monotonic)
    marks: deque[float] = field(default_factory=lambda: deque(maxlen=ETA_STEPS + 1))

    def restart(self, total: int, step: int) -> None:
        """Progress starts (or starts over) at ``step``."""
        self.total, self.step = total, step
        self.marks.clear()
        self.marks.append(time.monotonic())

    def advance(self, step: int) -> None:
        """``step`` is done."""
        self.step = step
        self.marks.append(time.monotonic())

    @property
    def eta_s(self) -> float | None:
        """Seconds left, evaluation and all; None before the first step is done."""
        if len(self.marks) < 2:
            return None
        return (self.total - self.step) * (self.marks[-1] - self.marks[0]) / (len(self.marks) - 1)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the view was made."""
        return time.monotonic() - self.began


class PlainView(View):
    """One line a step, for files and pipes."""

    def __init__(self) -> None:
        self._pace = Pace()

    def start(self, total: int, step: int) -> None:
        """Say where the run starts."""
        self._pace.restart(total, step)
        self._print(f"step {step}/{total}" + (" (resumed)" if step else ""))

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """One line."""
        self._pace.advance(step)
        eta = self._pace.eta_s
        faults = fault_counts(metrics)
        parts = [
            f"step {step}/{self._pace.total}",
            _labelled(metrics, "reward/mean", "reward {:.3f}") or _labelled(metrics, "learner/loss", "loss {:.4f}"),
            _labelled(metrics, "episode/return", "return {:.3f}"),
            _labelled(metrics, "mismatch/k3", "k3 {:.1e}"),
            _labelled(metrics, "rollout/tokens_per_s", "rollout {:,.0f} tok/s") + _labelled(metrics, "idle/rollout", ", idle {:.0%}"),
            _labelled(metrics, "rollout/steps_per_s", "{:,.0f} steps/s"),
            _labelled(metrics, "learner/tokens_per_s", "learner {:,.0f} tok/s") + _labelled(metrics, "idle/learner", ", idle {:.0%}"),
            _labelled(metrics, "staleness/mean", "stale {:.1f}"),
            _labelled(metrics, "time/step_s", "{:.1f} s"),
            f"ETA {clock(eta)}" if eta is not None and step < self._pace.total else "",
            f"failures: {faults}" if faults else "",
        ]
        self._print(" | ".join(p for p in parts if p))

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """One line an evaluation."""
        answers = _labelled(metrics, "eval/answers", " on {:.0f} held-out " + ("episodes" if "eval/success" in metrics else "answers"))
        failed = _labelled(metrics, "eval/failed", ", {:.0f} not scored") if metrics.get("eval/failed") else ""
        figure = _labelled(metrics, "eval/accuracy", "accuracy {:.1%}") or _labelled(metrics, "eval/loss", "loss {:.4f}")
        figure = figure or _labelled(metrics, "eval/return", "return {:.3f}") + _labelled(metrics, "eval/return_ci95", " ± {:.3f}")
        figure = figure or _labelled(metrics, "eval/success", "success {:.1%}") + _labelled(metrics, "eval/steps", " after {:.0f} steps")
        area = _labelled(metrics, "eval/auc", ", AUC {:.3f}")
        self._print(f"step {step}/{self._pace.total} | eval {figure}{area}{answers}{failed}")

    def rewound(self, step: int) -> None:
        """Progress starts over there; an event has told it."""
        self._pace.restart(self._pace.total, step)

    def event(self, text: str, level: Level) -> None:
        """One line."""
        self._print(text if level == "info" else f"{level}: {text}")

    def finish(self, lines: Sequence[str]) -> None:
        """The summary."""
        for line in lines:
            self._print(line)

    def _print(self, line: str) -> None:
        print(line, flush=True)


class RichView(View):
    """A panel that stays at the bottom of the terminal; events scroll by above it."""

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._console = console
        self._pace = Pace()
        self._metrics: dict[str, float] = {}
        self._rewards: deque[float] = deque(maxlen=24)
        self._evals: list[tuple[int, float]] = []
        self._samples: tuple[int, Sequence[SampleRow]] = (0, ())
        self._live = Live(self, console=console, refresh_per_second=2)

    def start(self, total: int, step: int) -> None:
        """Open the view."""
        self._pace.restart(total, step)
        self._live.start()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show the step; drawn with the next refresh."""
        self._pace.advance(step)
        self._metrics = {**self._metrics, **metrics}
        self._rewards.append(metrics.get("reward/mean", float("nan")))

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Show the evaluation."""
        if "eval/accuracy" in metrics:
            self._evals = [e for e in self._evals if e[0] < step] + [(step, metrics["eval/accuracy"])]

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Show these samples until the next ones come."""
        self._samples = (step, rows)

    def rewound(self, step: int) -> None:
        """Progress starts over there; an event has told it."""
        self._pace.restart(self._pace.total, step)
        self._evals = [e for e in self._evals if e[0] <= step]

    def event(self, text: str, level: Level) -> None:
        """A line above the view."""
        self._console.print(Text.assemble(("" if level == "info" else f"{level}: ", COLOURS[level]), text))

    def finish(self, lines: Sequence[str]) -> None:
        """Leave the last view standing and print the summary below it."""
        self._live.stop()
        for line in lines:
            self._console.print(Text(line), soft_wrap=True)  # paths and commands stay whole for copying

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The panel at the terminal's width."""
        ascii_only = options.ascii_only
        parts: list[Any] = [self._progress(), "", self._figures(ascii_only)]
        step, rows = self._samples
        if rows:
            parts += ["", Text(f"samples of step {step}", style="dim"), _sample_table(rows, ascii_only)]
        yield Panel(Group(*parts), title=Text(self._title), title_align="left", border_style="dim", padding=(0, 1))

    def _progress(self) -> Table:
        pace = self._pace
        eta = f"ETA {clock(pace.eta_s)}" if pace.eta_s is not None else "first step"
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(
            Text(f"step {pace.step}/{pace.total}", style="bold"),
            ProgressBar(total=max(pace.total, 1), completed=pace.step),
            Text(f"{clock(pace.elapsed_s)}  {eta if pace.step < pace.total else 'done'}"),
        )
        return row

    def _figures(self, ascii_only: bool) -> Table:
        def show(forms: dict[str, str]) -> str:
            """Each metric that is known, in its form."""
            return "  ".join(form.format(self._metrics[key]) for key, form in forms.items() if key in self._metrics)

        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        reward = show({"reward/mean": "{:.3f}", "reward/std": "std {:.3f}"})
        rows = {
            "reward": f"{reward}  {sparkline(self._rewards, ascii_only)}",
            "eval accuracy": self._eval_text(ascii_only),
            "mismatch": show({"mismatch/mean_abs": "mean {:.1e}", "mismatch/max_abs": "max {:.1e}", "mismatch/k3": "k3 {:.1e}"}),
            "rollout": show({"rollout/tokens_per_s": "{:,.0f} tokens/s", "idle/rollout": "idle {:.0%}"}),
            "learner": show({"learner/tokens_per_s": "{:,.0f} tokens/s", "idle/learner": "idle {:.0%}"}),
            "staleness": show({"staleness/mean": "mean {:.1f}", "staleness/max": "max {:.0f}"}),
            "step time": show({"time/step_s": "{:.1f} s"}),
        }
        for name, value in rows.items():
            table.add_row(name, Text(value.strip() or "-"))
        faults = fault_counts(self._metrics)
        table.add_row("failures", Text(faults or "none", style="red" if faults else ""))
        return table

    def _eval_text(self, ascii_only: bool) -> str:
        if not self._evals:
            return ""
        (first_step, first), (step, last) = self._evals[0], self._evals[-1]
        if first_step == step:
            return f"{last:.1%} (step {step})"
        arrow = "->" if ascii_only else "→"
        return f"{first:.1%} (step {first_step}) {arrow} {last:.1%} (step {step})"


def clock(seconds: float) -> str:
    """``4:05`` or ``1:04:05``."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def sparkline(values: Sequence[float] | deque[float], ascii_only: bool = False) -> str:
    """The course of ``values`` in one character each, lowest to highest; a value that is not a number leaves a gap."""
    bars = ASCII_BARS if ascii_only else BARS
    numbers = [v for v in values if v == v]
    if len(numbers) < 2:
        return ""
    low, span = min(numbers), max(numbers) - min(numbers) or 1.0
    return "".join(bars[int((v - low) / span * (len(bars) - 1))] if v == v else " " for v in values)


def fault_counts(metrics: dict[str, float]) -> str:
    """The ``faults/*`` totals that are not zero, as ``3 groups failed, 1 engine restarts``."""
    counts = {k.removeprefix("faults/").replace("_", " "): v for k, v in metrics.items() if k.startswith("faults/") and v}
    return ", ".join(f"{v:.0f} {k}" for k, v in counts.items())


def _sample_table(rows: Sequence[SampleRow], ascii_only: bool) -> Table:
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style="dim", show_edge=False)
    table.add_column("prompt", ratio=2, no_wrap=True)
    table.add_column("answer", ratio=2, no_wrap=True, overflow="ellipsis")
    table.add_column("expected", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("reward", justify="right", no_wrap=True)
    for row in rows:
        good = row.reward is not None and row.reward > 0
        reward = row.status if row.reward is None else f"{row.reward:.2f}"
        # A prompt's end is what tells it from the others: the beginning is often a shared header.
        prompt = _Tail(one_line(row.prompt, ascii_only), "..." if ascii_only else "…")
        answer, gold = one_line(row.answer, ascii_only), one_line("" if row.gold is None else str(row.gold), ascii_only)
        table.add_row(prompt, Text(answer), Text(gold), Text(reward, style="green" if good else ""))
    return table


@dataclass(frozen=True)
class _Tail:
    """The end of a text, as much of it as fits."""

    text: str
    mark: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        short = self.text if len(self.text) <= width else self.mark + self.text[len(self.mark) - width :]
        yield Text(short, no_wrap=True, overflow="crop")


def one_line(text: str, ascii_only: bool = False) -> str:
    """Line ends as a mark and control characters as ``?``, so that a model's output cannot move the cursor."""
    text = text.replace("\r\n", "\n").replace("\n", "\\n" if ascii_only else "⏎")
    return "".join(c if c.isprintable() else "?" for c in text)


def _labelled(metrics: dict[str, float], key: str, form: str) -> str:
    value = metrics.get(key)
    return "" if value is None else form.format(value)
