"""Learning curves: what is drawn, how seeds are put together, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from reasoner_ray.errors import DataError
from reasoner_ray.plot import group_seeds, load_run, plot_runs, running_mean


def make_run(path: Path, rewards: list[float | None], config: dict[str, Any] | None = None, **extra: float) -> Path:
    path.mkdir(parents=True)
    records = [{"step": i, "time": 0.0, "time/minutes": i / 2, "reward/mean": r, **extra} for i, r in enumerate(rewards, start=1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if config is not None:
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that were saved."""
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def keep(self: matplotlib.figure.Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def test_a_png_with_a_panel_a_metric(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [0.1, 0.2, 0.4], **{"mismatch/k3": 0.0, "rollout/tokens_per_s": 100.0, "other/thing": 1.0})
    out = tmp_path / "figures" / "a.png"
    assert plot_runs([run], out) == ["reward/mean", "mismatch/k3", "rollout/tokens_per_s"]
    pixels = imread(out)
    assert pixels.shape[0] > 500
    assert pixels.std() > 0.01  # not a blank page


@pytest.mark.parametrize(("x", "places"), [("steps", [1.0, 2.0, 3.0]), ("minutes", [0.5, 1.0, 1.5])])
def test_seeds_are_one_curve_with_a_band(tmp_path: Path, drawn: list[matplotlib.figure.Figure], x: Any, places: list[float]) -> None:
    runs = [make_run(tmp_path / f"poad-seed{i}", values) for i, values in enumerate(([0.0, 1.0, 2.0], [1.0, 3.0, 2.0, 9.0]))]
    plot_runs(runs, tmp_path / "a.png", ["reward/mean"], x=x)
    (panel,) = drawn[0].axes
    (line,) = panel.lines
    (band,) = panel.collections
    assert line.get_label() == "poad (2 seeds)"
    np.testing.assert_allclose(line.get_xydata(), np.column_stack([places, [0.5, 2.0, 2.0]]))  # no mean where one seed is missing
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.0, 3.0)


def test_a_metric_with_an_interval_has_it_as_a_band(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    run = make_run(tmp_path / "one", [0.0, 0.2, 0.4], **{"reward/mean_low": -0.1, "reward/mean_high": 0.45})
    plot_runs([run], tmp_path / "p.png", ["reward/mean"])
    (band,) = drawn[0].axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (pytest.approx(-0.1), pytest.approx(0.45))


def test_runs_are_compared_and_gaps_are_left_out(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    runs = [make_run(tmp_path / "poad", [0.1, None, 0.3]), make_run(tmp_path / "grpo", [0.2, 0.2, 0.2])]
    plot_runs(runs, tmp_path / "a.png", ["reward/mean"])
    poad, grpo = drawn[0].axes[0].lines
    assert [poad.get_label(), grpo.get_label()] == ["poad", "grpo"]
    np.testing.assert_allclose(poad.get_xdata(), [1, 3])
    assert [t.get_text() for t in drawn[0].legends[0].get_texts()] == ["poad", "grpo"]


def test_the_configuration_says_which_runs_are_seeds_of_one_experiment(tmp_path: Path) -> None:
    def config(seed: int, lr: float) -> dict[str, Any]:
        return {"name": f"n{seed}", "seed": seed, "learner": {"lr": lr}}

    paths = [
        make_run(tmp_path / "a-seed0", [0.1], config(0, 1e-5)),
        make_run(tmp_path / "a-seed1", [0.1], config(1, 1e-5)),
        make_run(tmp_path / "a-seed2", [0.1], config(2, 1e-6)),  # another learning rate
        make_run(tmp_path / "b_s1", [0.1]),
        make_run(tmp_path / "b_s2", [0.1]),
        make_run(tmp_path / "c" / "seed0", [0.1]),
        make_run(tmp_path / "c" / "seed1", [0.1]),
        make_run(tmp_path / "class1", [0.1]),
        make_run(tmp_path / "class2", [0.1]),
    ]
    groups = group_seeds([load_run(p) for p in paths])
    assert {label: [r.name for r in runs] for label, runs in groups.items()} == {
        "a (2 seeds)": ["a-seed0", "a-seed1"],
        "a-seed2": ["a-seed2"],
        "b (2 seeds)": ["b_s1", "b_s2"],
        "c (2 seeds)": ["seed0", "seed1"],
        "class1": ["class1"],
        "class2": ["class2"],
    }


def test_runs_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    runs = [load_run(make_run(tmp_path / folder / "quickstart", [0.1])) for folder in ("monday", "tuesday")]
    assert list(group_seeds(runs)) == ["quickstart", "tuesday/quickstart"]


def test_running_mean_by_hand() -> None:
    np.testing.assert_allclose(running_mean(np.array([1.0, 3.0, 5.0, 10.0]), 2), [1.0, 2.0, 4.0, 7.5])


def test_evaluations_are_not_smoothed(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    run = make_run(tmp_path / "a", [0.0, 1.0])
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.0}\n{"step": 10, "eval/accuracy": 1.0}\n')
    plot_runs([run], tmp_path / "a.png", smooth=5)
    np.testing.assert_allclose(drawn[0].axes[0].lines[0].get_ydata(), [0.0, 1.0])


def test_a_run_that_is_still_being_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "a", [0.1, 0.2])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    assert plot_runs([run], tmp_path / "a.png") == ["reward/mean"]
    assert "metrics.jsonl:3: skipped" in caplog.text


def test_bad_input_is_named(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "runs" / "a", [0.1]), tmp_path / "a.png"
    with pytest.raises(DataError, match=r"no metrics\.jsonl in .*nowhere"):
        plot_runs([tmp_path / "nowhere"], out)
    with pytest.raises(DataError, match=r"is not a run, but holds 1; plot them with: reasoner plot .*a$"):
        plot_runs([tmp_path / "runs"], out)
    with pytest.raises(DataError, match=r"no metric 'reward/meen'.*did you mean reward/mean\?"):
        plot_runs([run], out, ["reward/meen"])
    with pytest.raises(DataError, match="at least 1, not 0"):
        plot_runs([run], out, smooth=0)
    with pytest.raises(DataError, match="no run to plot"):
        plot_runs([], out)
    (run / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a line of JSON"):
        plot_runs([run], out)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="has no step yet"):
        plot_runs([run], out)
    assert not out.exists()
