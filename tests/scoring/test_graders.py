"""The pool of grader processes: whatever an answer does to its process, it gets a score that says so."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import ConfigError, EnvironmentProblem
from reasoner_ray.scoring.base import Answer, Term
from reasoner_ray.scoring.graders import GraderPool
from reasoner_ray.scoring.process import GraderDied, GraderProcess

ITEM = Item(id="i", prompt="", answer="7")
OBEY = Term("tests.scoring.graders_that_fail:obey")


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool([OBEY], processes=2, timeout_s=1.0) as made:
        yield made


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pids: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"still running: {[p for p in pids if is_running(p)]}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("text", "status", "error_type", "detail"),
    [
        ("raise", "error", "KeyError", "no such thing"),
        ("exit", "error", "GraderDied", "exited with status 3"),
        ("sys.exit", "error", "GraderDied", "exited with status 4"),
        ("segfault", "error", "GraderDied", "killed by SIGSEGV"),
        ("memory", "error", "MemoryError", ""),
        ("hang in python", "timeout", "Timeout", "within 1 s"),
        ("hang in C", "timeout", "Timeout", "within 1 s"),
        ("nan", "error", "ValueError", "finite"),
    ],
)
def test_a_disaster_is_a_status_and_the_pool_goes_on(pool: GraderPool, text: str, status: str, error_type: str, detail: str) -> None:
    before = pool.counts
    bad, good = pool.score([(Answer(text=text), ITEM), (Answer(text="fine"), ITEM)])
    assert (bad.status, bad.error_type) == (status, error_type)
    assert math.isnan(bad.value)
    assert detail in bad.detail
    assert (good.status, good.value) == ("ok", 1.0)
    after = pool.counts
    assert after[status] == before[status] + 1
    assert after["ok"] == before["ok"] + 1


def test_many_answers_among_disasters_keep_their_order(pool: GraderPool) -> None:
    texts = ["fine", "raise", "exit", "fine", "segfault"] * 8
    scores = pool.score((Answer(text=t), ITEM) for t in texts)
    assert [s.status == "ok" for s in scores] == [t == "fine" for t in texts]


def test_an_item_that_cannot_be_pickled_is_an_error(pool: GraderPool) -> None:
    (score,) = pool.score([(Answer(text="fine"), Item(id="i", prompt="", answer=threading.Lock()))])
    assert (score.status, score.error_type) == ("error", "TypeError")


def test_a_timeout_kills_what_the_grader_started(pool: GraderPool, tmp_path: Path) -> None:
    file = tmp_path / "pids"
    (score,) = pool.score([(Answer(text="hang with a child"), Item(id="i", prompt="", answer="", info={"file": str(file)}))])
    assert score.status == "timeout"
    pids = [int(pid) for pid in file.read_text().split()]
    assert len(pids) == 2
    wait_until_gone(pids)


def test_an_endless_sympy_expression_is_killed_and_counted() -> None:
    with GraderPool([Term("math")], processes=1, timeout_s=1.0) as pool:
        tower, right = pool.score([(Answer(text="\\boxed{9^{9^{9^{9}}}}"), ITEM), (Answer(text="\\boxed{7}"), ITEM)])
        assert (tower.status, tower.error_type) == ("timeout", "Timeout")
        assert right.value == 1.0
        assert pool.counts == {"ok": 1, "error": 0, "timeout": 1, "restarts": 1}


def test_a_process_killed_between_answers_costs_no_answer() -> None:
    started: list[GraderProcess] = []
    grader = GraderProcess([OBEY])
    started.append(grader)
    assert grader.grade(Answer(text="fine"), ITEM, 5.0).value == 1.0
    os.kill(grader._process.pid, signal.SIGKILL)
    with pytest.raises(GraderDied, match="SIGKILL"):
        grader.grade(Answer(text="fine"), ITEM, 5.0)
    assert not grader.is_alive
    grader.kill()


def test_the_pool_replaces_a_process_that_was_killed_while_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[GraderProcess] = []
    start = GraderProcess.__init__

    def remember(self: GraderProcess, terms: list[Term]) -> None:
        start(self, terms)
        made.append(self)

    monkeypatch.setattr(GraderProcess, "__init__", remember)
    with GraderPool([OBEY], processes=1) as pool:
        os.kill(made[0]._process.pid, signal.SIGKILL)
        wait_until_gone([made[0]._process.pid])
        (score,) = pool.score([(Answer(text="fine"), ITEM)])
        assert score.value == 1.0
        assert pool.counts["restarts"] == 1


def test_no_grader_outlives_a_killed_parent(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    code = (
        "from tests.scoring.test_graders import *\n"
        "pool = GraderPool([OBEY], timeout_s=100.0)\n"
        f"pool.score([(Answer(text='tell and hang'), Item(id='i', prompt='', answer='', info={{'file': {str(file)!r}}}))])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    grader = int(file.read_text())
    parent.kill()
    parent.wait()
    assert grader != parent.pid
    wait_until_gone([grader])


def test_scorers_that_cannot_be_built_are_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown scorer"):
        GraderPool([Term("exact")])
    with pytest.raises(ConfigError, match="either style or pattern"):
        GraderPool([Term("format")], processes=2)
    (tmp_path / "strange_scorer.py").write_text("class Strange:\n    def __init__(self):\n        raise OSError('no disk')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="did not start"):
        GraderPool([Term("strange_scorer:Strange")])


def test_a_users_function_by_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_reward.py").write_text(
        "def closeness(answer: str, item, scale: float = 1.0) -> float:\n"
        "    '''1 where right, less the further away; 0 without a number.'''\n"
        "    try:\n"
        "        return 1 / (1 + abs(float(answer) - float(item.answer)) / scale)\n"
        "    except ValueError:\n"
        "        return 0.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with GraderPool([Term("my_own_reward:closeness", 2.0, {"scale": 3.0})]) as pool:
        scores = pool.score((Answer(text=t), ITEM) for t in ("7", " 10\n", "ten"))
    assert [s.value for s in scores] == [2.0, 1.0, 0.0]


def test_grader_processes_import_nothing_heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "what_is_loaded.py").write_text(
        "import sys\ndef heavy(answer, item):\n    return float(len({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with GraderPool([Term("what_is_loaded:heavy"), Term("math", 0.0)]) as pool:
        assert [s.value for s in pool.score([(Answer(text="7"), ITEM)])] == [0.0]


def test_a_closed_pool_takes_no_answers() -> None:
    pool = GraderPool([OBEY])
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(Answer(text="fine"), ITEM)
