"""The math scorer: agreement with graded solutions, and answers a second through the pool of grader processes.

Agreement: OpenAI's 5,276 model solutions of GSM8K with outcome labels; MATH-500 solutions against their own reference
(all should be right) and against the next problem's (only equal references should be). Needs the sample data:
`python -m benchmarks.grader --data FOLDER`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

from benchmarks._record import record
from reasoner_ray.data.tasks import Item
from reasoner_ray.scoring.base import Answer, Score, Term
from reasoner_ray.scoring.graders import GraderPool

Judged = tuple[Answer, Item, bool]
"""An answer, its item, and whether it is right."""


def graded_gsm8k(data: Path) -> list[Judged]:
    """Every solution with its outcome label."""
    judged = []
    with gzip.open(data / "gsm8k" / "example_model_solutions.jsonl.gz", "rt") as lines:
        for number, row in enumerate(map(json.loads, lines)):
            reference = row["ground_truth"].rpartition("A:")[2].strip()
            for model, solution in ((k, v) for k, v in row.items() if isinstance(v, dict)):
                item = Item(id=f"{number}-{model}", prompt=row["question"], answer=reference)
                judged.append((Answer(text=solution["solution"]), item, bool(solution["is_correct"])))
    return judged


def math500(data: Path, shift: int) -> list[Judged]:
    """Each reference with the solution ``shift`` problems further on; equal references count as right."""
    rows = [json.loads(line) for line in (data / "math" / "math500_test.jsonl").read_text().splitlines()]
    shifted = rows[shift:] + rows[:shift]
    return [
        (
            Answer(text=other["solution"]),
            Item(id=row["unique_id"], prompt=row["problem"], answer=row["answer"]),
            row["answer"] == other["answer"],
        )
        for row, other in zip(rows, shifted, strict=True)
    ]


def agreement(judged: list[Judged], scores: list[Score]) -> dict[str, Any]:
    """Share of scores that say what the label says; failures are counted apart."""
    agree = [(score.value == 1.0) == right for (_, _, right), score in zip(judged, scores, strict=True) if score.status == "ok"]
    low, high = wilson(sum(agree), len(agree))
    failed = sum(score.status != "ok" for score in scores)
    return {"answers": len(scores), "agreement": sum(agree) / len(agree), "interval_95": [low, high], "failed": failed}


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, min(1.0, middle + half)


def answers_per_second(judged: list[Judged], processes: int, rounds: int) -> list[float]:
    """Throughput of each of ``rounds`` passes over ``judged``, after one answer a process to warm up."""
    rates = []
    with GraderPool([Term("math")], processes=processes) as pool:
        pool.score([judged[0][:2]] * processes * 4)
        for _ in range(rounds):
            start = time.perf_counter()
            pool.score((answer, item) for answer, item, _ in judged)
            rates.append(len(judged) / (time.perf_counter() - start))
    return rates


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data", help="folder of the sample data"
    )
    parser.add_argument("--rounds", type=int, default=3, help="passes a throughput is measured over")
    args = parser.parse_args()
    gsm8k = graded_gsm8k(args.data)
    sets = {"gsm8k_graded": gsm8k, "math500_own": math500(args.data, 0), "math500_other": math500(args.data, 1)}
    figures: dict[str, Any] = {}
    with GraderPool([Term("math")], processes=2) as pool:
        for name, judged in sets.items():
            figures[name] = agreement(judged, pool.score((answer, item) for answer, item, _ in judged))
    for processes in (1, 2):
        figures[f"gsm8k_answers_per_s_{processes}_processes"] = answers_per_second(gsm8k, processes, args.rounds)
    record("grader", settings={"scorer": "math", "timeout_s": 10.0, "rounds": args.rounds}, figures=figures)


if __name__ == "__main__":
    main()
