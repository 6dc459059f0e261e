"""Sampling that stops when the belief over answers is settled, against a fixed number of samples.

Two runs of `reasoner search` with self_consistency and a fixed N for each seed, one on training items and one on held-out items: the
threshold is calibrated on the first and replayed on the second, sample by sample, so both sides see the same samples. Nothing is
generated here.

    reasoner search JOB name=train-1 seed=1 search.split=train
    reasoner search JOB name=held-out-1 seed=1
    python -m benchmarks.adaptive_stopping --calibrate runs/train-*/search/results.jsonl --report runs/held-out-*/search/results.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._record import record
from reasoner_ray.search.results import read_results, recorded_samples
from reasoner_ray.search.settings import StoppingConfig
from reasoner_ray.search.stopping import Replay, calibrate


def intervals(questions: list[tuple[bool, bool, int, int]], draws: int = 10_000) -> dict[str, list[float]]:
    """95 % intervals over questions (bootstrap) of tokens saved and of accuracy against all samples."""
    stopped, fixed, used, total = np.array(questions, dtype=float).T
    drawn = np.random.default_rng(0).integers(len(questions), size=(draws, len(questions)))
    saved = 1 - used[drawn].sum(1) / total[drawn].sum(1)
    change = (stopped - fixed)[drawn].mean(1)
    return {
        "tokens_saved_95": np.percentile(saved, [2.5, 97.5]).tolist(),
        "accuracy_change_95": np.percentile(change, [2.5, 97.5]).tolist(),
    }


def stopped(calibrate_on: Path, report_on: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What the threshold of one run's samples does on another's."""
    train, held_out = (recorded_samples(read_results(path)) for path in (calibrate_on, report_on))
    chosen = calibrate(train, StoppingConfig(), tolerance=args.tolerance, wave=args.wave)
    replay = Replay(held_out, StoppingConfig(), args.wave)
    tried, questions = replay.run(chosen.threshold), replay.questions(chosen.threshold)
    return {
        "threshold, nats": chosen.threshold,
        "samples": len(held_out[0].groups),
        "questions": len(held_out),
        "accuracy of all samples, %": 100 * tried.fixed_accuracy,
        "change of accuracy when settled, points": 100 * (tried.accuracy - tried.fixed_accuracy),
        "tokens saved, %": 100 * tried.tokens_saved,
        "tokens saved on the training items, %": 100 * chosen.tokens_saved,
        "intervals": intervals(questions),
    }


def main() -> None:
    """Calibrate, replay and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True, help="results.jsonl of training items, a seed each")
    parser.add_argument("--report", type=Path, nargs="+", required=True, help="results.jsonl of held-out items, in the same order")
    parser.add_argument("--tolerance", type=float, default=0.01, help="accuracy that may be lost on the training items")
    parser.add_argument("--wave", type=int, default=1, help="samples between two looks at the belief")
    parser.add_argument("--name", default="adaptive_stopping")
    args = parser.parse_args()
    if len(args.calibrate) != len(args.report):
        parser.error(f"{len(args.calibrate)} runs to calibrate on and {len(args.report)} to report on: one of each a seed")
    seeds = [stopped(train, held_out, args) for train, held_out in zip(args.calibrate, args.report, strict=True)]
    figures = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    record(args.name, settings={"tolerance": args.tolerance, "wave": args.wave}, figures=figures)


if __name__ == "__main__":
    main()
