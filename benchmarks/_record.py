"""What every measurement shares: sides that alternate, and a result file that says how it came about."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Wall-clock seconds of each call, ``repeats`` a side.

    The sides take turns and each round reverses their order, so that a machine that grows busier or hotter slows all
    of them alike. The first ``warmup`` rounds are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(-warmup, repeats):
        for name, side in reversed(list(sides.items())) if i % 2 else sides.items():
            start = time.perf_counter()
            side()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Ratio of each round's pair: what the sides shared of the machine's mood cancels."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def record(name: str, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> Path:
    """Write ``benchmarks/results/NAME.json`` and print its figures.

    A figure that is a list of numbers is one measured several times: it is stored with its mean and spread. Returns the file.
    """
    shown = {key: _with_spread(value) for key, value in figures.items()}
    result = {
        "name": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "settings": dict(settings),
        "figures": shown,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print_table(shown)
    print(f"written to {path}")
    return path


def print_table(figures: Mapping[str, Any]) -> None:
    """One line a figure: its value, or mean and range."""
    width = max(map(len, figures), default=0)
    for key, value in figures.items():
        if isinstance(value, dict) and "mean" in value:
            shown = f"{_short(value['mean'])}  ({_short(value['min'])} to {_short(value['max'])}, n={len(value['values'])})"
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            shown = f"{len(value)} rows"
        else:
            shown = _short(value)
        print(f"{key:<{width}}  {shown}")


def _with_spread(value: Any) -> Any:
    if not (isinstance(value, list | tuple) and value and all(isinstance(v, int | float) for v in value)):
        return value
    spread = statistics.stdev(value) if len(value) > 1 else 0.0
    return {"mean": statistics.fmean(value), "stdev": spread, "min": min(value), "max": max(value), "values": list(value)}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _commit() -> str:
    """The commit measured, marked where tracked files differ from it; of a copy without git what ``$MEASURED_COMMIT`` says."""
    root = Path(__file__).parent.parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        # Records of other benchmarks change nothing that is measured here.
        status = ["git", "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"]
        changed = subprocess.run(status, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MEASURED_COMMIT", "not a git checkout")
    return head + ("+changes" if changed.strip() else "")


def _machine() -> dict[str, Any]:
    import torch

    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(pages * page / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[1], 2),  # over five minutes: above the number of cores, others were at work
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
