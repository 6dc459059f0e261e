"""The comparison of search methods: equal budgets, intervals, and runs that are done once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.search_methods import EQUAL, SWEEPS, TASKS, Bench, by_item, fitted, interval, points_above, read_arguments
from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.search.core import SEARCHES
from reasoner_ray.search.results import COSTS

JOBS = Path(__file__).parents[2] / "jobs" / "search"


class Searches:
    """In place of an engine: solutions of 20 tokens; the more of them a search may sample, the more items are right."""

    def __init__(self) -> None:
        self.asked: list[JobConfig] = []

    def __call__(self, job: JobConfig) -> dict[str, Any]:
        self.asked.append(job)
        budget = job.search.budget.generated or 20
        right = [1.0] * (2 if job.search.method == "mcts" else 1) + [float(job.seed == 0), 0.0][: 2 if job.search.method != "mcts" else 1]
        cost = dict.fromkeys(COSTS, 0.0) | {"generated": float(budget), "requests": budget / 20, "prompt": 7.0, "scorer": 3.0}
        figures = {"accuracy": sum(right) / 3, "confidence": 0.5, "wall_an_item": 2.0, "unsolved": 0, "unjudged": 0}
        return {**figures, "cost": cost, "accuracy_by": {"majority": 0.5}, "right_items": right}


def bench(folder: Path, searches: Searches, **more: Any) -> Bench:
    return Bench(base=load_config(JOBS / "arithmetic_mcts.yaml"), run=searches, folder=folder, seeds=2, **more)


def test_at_equal_tokens_every_search_has_the_same_budget(tmp_path: Path) -> None:
    searches = Searches()
    rows = bench(tmp_path, searches).at_equal_tokens(EQUAL, [200, 400])
    assert [(row["budget"], row["method"]) for row in rows] == [(budget, method) for budget in (200, 400) for method in EQUAL]
    for job in searches.asked:
        assert (job.search.budget.generated is None) == (job.search.method != "mcts"), "the others are as large as the budget says"
    assert [row["settings"] for row in rows if row["method"] == "best_of_n"] == [{"paths": 10}, {"paths": 20}]
    beams = [row["settings"] for row in rows if row["method"] == "beam"]
    assert beams == [{"paths": 2, "width": 5}, {"paths": 5, "width": 4}], "10 and 20 solutions of 20 tokens"
    mcts = next(row for row in rows if row["method"] == "mcts" and row["budget"] == 400)
    assert {name: mcts[name]["mean"] for name in ("generated", "prompt", "scorer", "wall_an_item")} == {
        "generated": 400.0,
        "prompt": 7.0,
        "scorer": 3.0,
        "wall_an_item": 2.0,
    }
    assert mcts["accuracy"]["values"] == pytest.approx([1.0, 2 / 3])
    assert mcts["above_best_of_n"]["points"] == pytest.approx(100 / 6 + 100 / 6), "item 1 in one seed of two, item 2 in the other"
    assert "above_best_of_n" not in next(row for row in rows if row["method"] == "best_of_n")


def test_what_has_been_run_is_not_run_again(tmp_path: Path) -> None:
    first, second, other = Searches(), Searches(), Searches()
    rows = bench(tmp_path, first).swept(["greedy", "mcts"], 2)
    assert [row["settings"] for row in rows] == [{}, *SWEEPS["mcts"][:2]]
    assert len(first.asked) == 2 * 3
    assert {job.search.budget.generated for job in first.asked} == {None}
    assert bench(tmp_path, second).swept(["mcts", "greedy"], 2) == [*rows[1:], rows[0]]
    assert second.asked == []
    bench(tmp_path, other, models=("another",)).swept(["greedy"], 1)
    assert len(other.asked) == 2, "other weights are another measurement"


def test_every_method_has_sizes() -> None:
    assert set(SWEEPS) == set(SEARCHES.names())


def test_a_value_below_0_in_one_seed_takes_no_row(tmp_path: Path) -> None:
    class Below(Searches):
        def __call__(self, job: JobConfig) -> dict[str, Any]:
            return super().__call__(job) | {"accuracy_by": {"majority": 0.5} | ({} if job.seed else {"product/vote": 1.0})}

    (row,) = bench(tmp_path, Below()).swept(["greedy"], 1)
    assert row["accuracy_by"] == {"majority": 0.5}


@pytest.mark.parametrize("method", SWEEPS)
def test_fitted_settings_are_the_methods_own(method: str) -> None:
    for budget in (10, 1000):
        SEARCHES.get(method).settings(fitted(method, budget, 40.0))


def test_fitted_sizes() -> None:
    assert fitted("best_of_n", 300, 40.0) == {"paths": 8}, "no fewer tokens than the budget, so that no other has more for that"
    assert fitted("beam", 300, 40.0) == {"paths": 2, "width": 4}, "as many as there are plain samples"
    assert fitted("beam", 280, 40.0) == {"paths": 2, "width": 3}, "seven samples: six fit in"
    assert fitted("beam", 100, 40.0) == {"paths": 1, "width": 3}
    assert fitted("beam", 10, 40.0) == {"paths": 1, "width": 1}
    assert fitted("mcts", 300, 40.0) == {"paths": 30, "width": 4}


def test_intervals() -> None:
    assert interval([0.0] * 10) == pytest.approx([0.0, 0.27753], abs=1e-4)
    assert interval([1.0, 0.0] * 5) == pytest.approx([0.23659, 0.76341], abs=1e-4)
    assert interval([0.5] * 10) == interval([1.0, 0.0] * 5), "seeds that disagree about each item are no more sure"


def test_differences_are_of_pairs() -> None:
    ours: list[dict[str, Any]] = [{"right_items": [1.0, 1.0, None, 1.0]}, {"right_items": [1.0, 0.0, 1.0, 1.0]}]
    theirs: list[dict[str, Any]] = [{"right_items": [0.0, 0.0, 1.0, None]}]
    assert by_item(ours) == {0: 1.0, 1: 0.5, 3: 1.0}, "item 2 was not judged in one seed"
    found = points_above(ours, theirs)
    assert found["points"] == pytest.approx(75.0)
    assert found["points_95"] == pytest.approx([50.0, 100.0]), "two common items, 100 and 50 points"
    assert points_above(theirs, theirs) == {"points": 0.0, "points_95": [0.0, 0.0]}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_names_its_job_and_its_budgets(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["search_methods", "--task", task, "search.items=3", "--seeds", "1"])
    arguments = read_arguments()
    assert load_config(arguments.job, arguments.overrides).search.items == 3
    assert (arguments.tokens, arguments.sizes) == TASKS[task]
    assert arguments.name == f"search_{task}"


def test_a_job_is_swept_in_full_unless_budgets_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    job = JOBS / "arithmetic_mcts.yaml"
    for words in ([str(job), "search.items=3"], ["--job", str(job), "search.items=3"]):
        monkeypatch.setattr(sys, "argv", ["search_methods", *words])
        arguments = read_arguments()
        assert (arguments.job, arguments.overrides, arguments.tokens, arguments.sizes) == (job, ["search.items=3"], [], None)
    monkeypatch.setattr(sys, "argv", ["search_methods", "--job", str(job), "--tokens", "50", "--sizes", "0"])
    assert (read_arguments().tokens, read_arguments().sizes) == ([50], 0)
    monkeypatch.setattr(sys, "argv", ["search_methods"])
    with pytest.raises(SystemExit):
        read_arguments()
