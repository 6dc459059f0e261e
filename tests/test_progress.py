"""Progress as lines where there is no terminal."""

from __future__ import annotations

import pytest

from reasoner_ray import progress
from reasoner_ray.progress import show_progress


def test_lines_come_now_and_then_and_at_both_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with show_progress("questions", 10, done=4) as counter:
        for i in range(6):
            now[0] += 4.0
            counter.advance(f"{i + 1} new")
    assert capsys.readouterr().out.splitlines() == [
        "questions 4/10 | 0:00",
        "questions 7/10 | 0:12 | ETA 0:12 | 3 new",
        "questions 10/10 | 0:24 | 6 new",
    ]


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True)
    with show_progress("questions", 2) as counter:
        counter.advance()
        counter.advance("all good")
    out = capsys.readouterr().out
    assert "questions" in out and "2/2" in out and "all good" in out
