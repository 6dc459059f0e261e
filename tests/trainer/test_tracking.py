"""The record of a run, W&B (the real client, against a server on loopback) and the terminal."""

from __future__ import annotations

import contextlib
import io
import json
import math
import resource
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb
from rich.console import Console

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.errors import DataError, EnvironmentProblem
from reasoner_ray.trainer import wandb_writer
from reasoner_ray.trainer.checkpoint import MANIFEST, checkpoint_dir
from reasoner_ray.trainer.terminal import PlainView, RichView, clock, make_view, sparkline
from reasoner_ray.trainer.tracking import SampleRow, Tracker
from tests.trainer.fake_wandb import API_KEY, FakeWandb


def job(tmp_path: Path, wandb_mode: str = "off", terminal: str = "off", **tracking: Any) -> JobConfig:
    return parse_config(
        {
            "name": "job",
            "out": str(tmp_path),
            "algorithm": {"name": "grpo"},
            "tracking": {"wandb": wandb_mode, "terminal": terminal, **tracking},
        }
    )


def tracker(config: JobConfig, resume: bool = False) -> Tracker:
    return Tracker(config, config.run_dir, resume)


def lines(config: JobConfig, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / name).read_text().splitlines()]


def texts(config: JobConfig) -> list[str]:
    return [event["text"] for event in lines(config, "events.jsonl")] if (config.run_dir / "events.jsonl").exists() else []


def row(answer: str, reward: float | None = 1.0) -> SampleRow:
    return SampleRow(prompt="3 + 4 =", answer=answer, reward=reward, status="finished", gold=7)


# -- the record ------------------------------------------------------------------------------------------------


def test_one_line_a_step_and_the_evaluation_joins_it(tmp_path: Path) -> None:
    config = job(tmp_path)
    t = tracker(config)
    t.start(2, 0)
    t.eval(0, {"eval/accuracy": 0.25})
    t.log(1, {"reward/mean": 0.5, "critic/explained_variance": math.nan})
    t.log(2, {"reward/mean": 0.75})
    t.eval(2, {"eval/accuracy": 0.5})
    t.finish("finished")
    record = lines(config)
    assert [r["step"] for r in record] == [0, 1, 2]
    assert record[0]["eval/accuracy"] == 0.25
    assert record[1]["critic/explained_variance"] is None  # JSON has no NaN
    assert (record[2]["reward/mean"], record[2]["eval/accuracy"]) == (0.75, 0.5)
    assert 0 <= record[1]["time/minutes"] <= record[2]["time/minutes"]


def test_a_resumed_run_has_each_step_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = job(tmp_path)
    t = tracker(config)
    t.start(6, 0)
    for step in range(1, 6):
        t.log(step, {"reward/mean": step / 10})
        t.samples(step, [row("7")])
    file = config.run_dir / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-9])  # killed while it wrote step 5
    t = tracker(config, resume=True)
    t.start(6, 3)
    assert "metrics.jsonl:5" in caplog.text
    for step in range(4, 7):
        t.log(step, {"reward/mean": 1.0})
        t.samples(step, [row("8")])
    record, shown = lines(config), lines(config, "samples.jsonl")
    assert [r["step"] for r in record] == [s["step"] for s in shown] == [1, 2, 3, 4, 5, 6]
    assert [r["reward/mean"] for r in record] == [0.1, 0.2, 0.3, 1.0, 1.0, 1.0]
    minutes = [r["time/minutes"] for r in record]
    assert minutes == sorted(minutes)


def test_a_resume_right_at_the_last_step_still_takes_its_evaluation(tmp_path: Path) -> None:
    config = job(tmp_path)
    t = tracker(config)
    t.start(2, 0)
    t.log(1, {"reward/mean": 0.1})
    t.log(2, {"reward/mean": 0.2})
    t = tracker(config, resume=True)
    t.start(2, 2)
    t.eval(2, {"eval/accuracy": 0.9})
    assert [(r["step"], r["reward/mean"], r.get("eval/accuracy")) for r in lines(config)] == [(1, 0.1, None), (2, 0.2, 0.9)]


def test_going_back_in_mid_run(tmp_path: Path) -> None:
    config = job(tmp_path)
    t = tracker(config)
    t.start(5, 0)
    for step in (1, 2, 3):
        t.log(step, {"reward/mean": 0.1})
    with pytest.raises(ValueError, match=r"step 2 after those of step 3; call rewind\(1\)"):
        t.log(2, {"reward/mean": 0.1})
    t.rewind(1)
    t.log(2, {"reward/mean": 0.9})
    assert [(r["step"], r["reward/mean"]) for r in lines(config)] == [(1, 0.1), (2, 0.9)]


@pytest.mark.parametrize("broken", ['{"step": 1, "rew', '["step", 1]', '{"reward/mean": 1.0}', "\xff"])
def test_a_broken_line_is_named(tmp_path: Path, broken: str) -> None:
    config = job(tmp_path)
    config.run_dir.mkdir()
    file = config.run_dir / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n' + broken.encode("latin-1") + b'\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a"):
        tracker(config, resume=True).start(5, 2)


def test_a_full_disk_is_told_once_and_loses_no_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job(tmp_path)
    t = tracker(config)
    t.start(6, 0)
    t.log(1, {"reward/mean": 0.1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((config.run_dir / "metrics.jsonl").stat().st_size + 20, hard))
    try:
        t.log(2, {"reward/mean": 0.2})
        t.eval(2, {"eval/accuracy": 0.5})
        t.log(3, {"reward/mean": 0.3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.count("cannot write") == 1
    t.log(4, {"reward/mean": 0.4})
    assert [(r["step"], r["reward/mean"], r.get("eval/accuracy")) for r in lines(config)] == [
        (1, 0.1, None),
        (2, 0.2, 0.5),
        (3, 0.3, None),
        (4, 0.4, None),
    ]


def test_samples_are_spread_over_the_groups(tmp_path: Path) -> None:
    config = job(tmp_path, sample_rows=2)
    t = tracker(config)
    t.start(1, 0)
    t.samples(1, [row(str(i)) for i in range(8)])
    t.samples(1, [])
    assert [s["answer"] for s in lines(config, "samples.jsonl")] == ["0", "4"]


def test_a_trained_group_is_listed_once_whatever_the_run_goes_back_over(tmp_path: Path) -> None:
    config = job(tmp_path)
    t = tracker(config)
    t.start(3, 0)
    for step in (1, 2):
        t.groups(step, [{"group": 2 * step + i, "item": "a", "reward": math.nan, "tokens": 3} for i in range(2)])
    t.rewind(1)
    t.groups(2, [{"group": 4, "item": "b", "reward": 0.5, "tokens": 3}])
    assert [(r["step"], r["group"], r["item"], r["reward"]) for r in lines(config, "groups.jsonl")] == [
        (1, 2, "a", None),
        (1, 3, "a", None),
        (2, 4, "b", 0.5),
    ]


# -- W&B -------------------------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    """A logged-in W&B client and the server it talks to."""
    server = FakeWandb()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    wandb.teardown()  # forget the settings of other tests
    yield server
    wandb.teardown()
    server.stop()


def eventually(holds: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_offline_where_nobody_is_logged_in_and_the_printed_command_uploads_the_whole_run(
    tmp_path: Path, nobody: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job(tmp_path, "auto", "plain")
    t = tracker(config)
    t.start(4, 0)
    for step in (1, 2, 3):
        t.log(step, {"reward/mean": step / 10})
    t.finish("interrupted")
    t = tracker(config, resume=True)
    t.start(4, 2)
    for step in (3, 4):
        t.log(step, {"reward/mean": step / 10})
        t.samples(step, [row("7"), row("?", reward=None)])
    t.finish("finished")
    out, err = capsys.readouterr()
    assert err == ""  # W&B's own chatter is not for this terminal
    command = out.rsplit("upload with: ", 1)[1].splitlines()[0]
    run_id = (config.run_dir / "wandb_run_id").read_text().strip()
    assert run_id in command

    server = FakeWandb()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    wandb.teardown()  # or the command would talk to this process's W&B service
    upload = subprocess.run(shlex.split(command), timeout=60, capture_output=True, text=True, cwd=tmp_path)
    assert upload.returncode == 0, upload.stderr
    server.stop()
    assert server.steps(run_id) == [1, 2, 3, 4]
    assert [r["reward/mean"] for _, r in sorted(server.history[run_id].items())] == [0.1, 0.2, 0.3, 0.4]


def test_one_online_run_across_a_resume_and_no_step_goes_backwards(
    tmp_path: Path, online: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job(tmp_path, "auto")
    t = tracker(config)
    t.start(6, 0)
    for step in (1, 2, 3, 4):
        t.log(step, {"reward/mean": step / 10})
    t.finish("failed")
    (run_id,) = online.history
    assert online.steps(run_id) == [1, 2, 3, 4]
    del online.history[run_id][3]  # W&B never got step 4, as after a kill
    t = tracker(config, resume=True)
    t.start(6, 2)  # the checkpoint is older than W&B
    for step in (3, 4, 5, 6):
        t.log(step, {"reward/mean": 1.0})
    t.finish("finished")
    assert list(online.history) == [run_id]
    assert online.steps(run_id) == [1, 2, 3, 4, 5, 6]
    assert any("already has steps up to 3" in text for text in texts(config))
    assert capsys.readouterr().err == ""


def test_a_run_that_was_offline_is_completed_online(tmp_path: Path, online: FakeWandb) -> None:
    t = tracker(job(tmp_path, "offline"))
    t.start(3, 0)
    t.log(1, {"reward/mean": 0.1})
    t.log(2, {"reward/mean": 0.2})
    t.finish("interrupted")
    t = tracker(job(tmp_path, "online"), resume=True)
    t.start(3, 2)
    t.log(3, {"reward/mean": 0.3})
    t.finish("finished")
    assert [online.steps(run_id) for run_id in online.history] == [[1, 2, 3]]


def test_training_goes_on_where_wandb_goes_away(
    tmp_path: Path, online: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb_writer, "CHECK_EVERY_S", 0.2)
    monkeypatch.setattr(wandb_writer, "FINISH_TIMEOUT_S", 1.0)
    config = job(tmp_path, "online", "plain")
    t = tracker(config)
    t.start(20, 0)
    t.log(1, {"reward/mean": 0.1})
    assert eventually(lambda: any("W&B: http" in text for text in texts(config)))
    online.stop()
    for step in range(2, 12):
        t.log(step, {"reward/mean": 0.1})
    assert eventually(lambda: any("does not answer" in text for text in texts(config)))
    time.sleep(0.5)
    t.finish("finished")
    assert sum("does not answer" in text for text in texts(config)) == 1
    assert [r["step"] for r in lines(config)] == list(range(1, 12))
    assert "wandb sync --include-online" in capsys.readouterr().out


def test_an_unreachable_server_at_the_start_means_offline(tmp_path: Path, online: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    online.stop()
    monkeypatch.setattr(wandb_writer, "INIT_TIMEOUT_S", 1.0)
    config = job(tmp_path, "auto")
    t = tracker(config)
    t.start(1, 0)
    t.log(1, {"reward/mean": 0.1})
    assert eventually(lambda: any("W&B: offline" in text for text in texts(config)))
    t.finish("finished")
    assert any("cannot be reached" in text for text in texts(config))


def test_training_goes_on_where_the_wandb_service_dies(tmp_path: Path, nobody: None, capsys: pytest.CaptureFixture[str]) -> None:
    config = job(tmp_path, "offline", "plain")
    t = tracker(config)
    t.start(9, 0)
    assert eventually(lambda: any("W&B: offline" in text for text in texts(config)))
    (service,) = [p for p in psutil.Process().children() if "wandb-core" in p.name()]
    service.kill()
    service.wait()
    for step in range(1, 10):
        t.log(step, {"reward/mean": 0.1})
        time.sleep(0.02)
    t.finish("finished")
    assert sum("given up" in text for text in texts(config)) == 1
    assert [r["step"] for r in lines(config)] == list(range(1, 10))
    assert "incomplete; upload with" in capsys.readouterr().out
    with contextlib.suppress(OSError):  # its connection is gone; the next one is fresh
        wandb.teardown()


def test_online_without_a_login_is_refused_at_once(tmp_path: Path, nobody: None) -> None:
    with pytest.raises(EnvironmentProblem, match="wandb login"):
        tracker(job(tmp_path, "online"))


def test_finish_without_start_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t = tracker(job(tmp_path, "offline", "plain"))
    t.finish("failed")
    t.finish("failed")
    out = capsys.readouterr().out
    assert out.count("failed after 0 of ") == 1 and "--resume" not in out, "nothing to go on from"


def test_a_run_that_was_interrupted_says_how_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job(tmp_path, "off", "plain")
    t = tracker(config)
    t.start(4, 0)
    checkpoint_dir(config.run_dir, 1).mkdir(parents=True)
    (checkpoint_dir(config.run_dir, 1) / MANIFEST).write_text("{}")
    t.finish("interrupted")
    assert f"reasoner train {config.run_dir}/config.yaml --resume" in capsys.readouterr().out


# -- the terminal ----------------------------------------------------------------------------------------------

STEP = {
    "reward/mean": 0.5, "reward/std": 0.44, "mismatch/mean_abs": 2e-7, "mismatch/k3": 1e-13, "rollout/tokens_per_s": 1234.0,
    "learner/tokens_per_s": 3456.0, "idle/rollout": 0.12, "idle/learner": 0.44, "staleness/mean": 0.5, "staleness/max": 1.0,
    "faults/groups_failed": 2.0, "faults/engine_restarts": 0.0, "time/step_s": 12.3,
}  # fmt: skip


def screen(width: int) -> str:
    view = RichView("job: grpo", Console(file=io.StringIO(), width=width, force_terminal=True))
    view.start(20, 0)
    view.evaluated(0, {"eval/accuracy": 0.27})
    for step in (1, 2):
        view.update(step, {**STEP, "reward/mean": step / 4})
    view.evaluated(2, {"eval/accuracy": 0.61})
    view.samples(2, [row("\x1b[31m7\n[bold]so"), row("a long answer " * 20, reward=None)])
    view.finish(["finished"])
    file = io.StringIO()
    Console(file=file, width=width).print(view)  # what stood there last, without the moves of the cursor
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 60, 140])
def test_the_view_fits_the_terminal(width: int) -> None:
    text = screen(width)
    assert max(len(line) for line in text.splitlines()) <= width
    for part in ("step 2/20", "0.500", "27.0% (step 0) → 61.0% (step 2)", "1,234 tokens/s  idle 12%", "2 groups failed", "ETA"):
        assert part in text


def test_what_a_model_writes_cannot_control_the_terminal() -> None:
    text = screen(100)
    assert "\x1b" not in text
    assert "?[31m7⏎[bold]so" in text


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView()
    view.start(4, 2)
    view.update(3, STEP)
    view.evaluated(3, {"eval/accuracy": 0.5, "eval/answers": 128.0, "eval/failed": 1.0})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "step 2/4 (resumed)"
    assert out[1].startswith("step 3/4 | reward 0.500 | k3 1.0e-13 | rollout 1,234 tok/s, idle 12% | learner 3,456 tok/s, idle 44%")
    assert out[1].endswith("failures: 2 groups failed")
    assert out[2] == "step 3/4 | eval accuracy 50.0% on 128 held-out answers, 1 not scored"
    view.evaluated(4, {"eval/accuracy": 0.5, "eval/answers": 7.0, "eval/success": 0.5})
    assert capsys.readouterr().out == "step 4/4 | eval accuracy 50.0% on 7 held-out episodes\n"


def test_small_pieces() -> None:
    assert clock(65) == "1:05"
    assert clock(3665) == "1:01:05"
    assert sparkline([0.0, math.nan, 1.0]) == "▁ █"
    assert sparkline([0.0, 1.0], ascii_only=True).isascii()
    console = Console(file=io.StringIO(), width=80)
    RichView("job", console).event("engine 0 was restarted [1 of 3]", "warning")
    assert console.file.getvalue() == "warning: engine 0 was restarted [1 of 3]\n"  # type: ignore[attr-defined]
    assert isinstance(make_view("auto", "x"), PlainView)  # pytest's stdout is no terminal
