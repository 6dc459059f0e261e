"""Hosts and their pool: whatever an environment does costs its own episode, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from reasoner_ray import child_process
from reasoner_ray.envs.host import HostPool, check_environment
from reasoner_ray.envs.player import EnvironmentFailure, EnvironmentSpec, StepResult
from reasoner_ray.errors import ConfigError, EnvironmentProblem

OBEY = "tests.envs.environments_that_fail:Obey"


def spec(*, isolate: bool | None = True, timeout_s: float = 20.0, **kwargs: Any) -> EnvironmentSpec:
    return EnvironmentSpec(id=OBEY, kwargs=kwargs, isolate=isolate, timeout_s=timeout_s)


def alive() -> set[int]:
    """Ids of every process below this one, zombies left out."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE:
                found.add(child.pid)
        except psutil.NoSuchProcess:
            pass
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before, descriptors = alive(), len(os.listdir("/proc/self/fd"))
    yield
    wait_for(lambda: alive() <= before)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1  # asyncio may keep one


def run(play: Callable[[HostPool], Coroutine[Any, Any, Any]], processes: int = 2) -> Any:
    """Run a coroutine with a pool that is closed after it."""

    async def main() -> Any:
        pool = HostPool(processes)
        try:
            return await play(pool)
        finally:
            pool.close()

    return asyncio.run(main())


async def episode(pool: HostPool, spec: EnvironmentSpec, *actions: str, seed: int = 0) -> list[StepResult]:
    host = await pool.acquire(spec)
    try:
        results = [await host.reset(seed)]
        for action in actions:
            results.append(await host.step(action))
        return results
    finally:
        await host.release()


def process_of(result: StepResult) -> int:
    return int(result.observation.split()[2])


@pytest.mark.parametrize("isolate", [False, True])
def test_an_episode(isolate: bool) -> None:
    start, *steps = run(lambda pool: episode(pool, spec(isolate=isolate), "go", "stay", "go", seed=7))
    assert start.observation.startswith("7 0 ")
    assert (start.reward, start.terminated, start.success, start.admissible) == (0.0, False, False, ["go", "stay"])
    assert [s.reward for s in steps] == [0.5, 0.5, 0.5]
    assert [s.terminated for s in steps] == [False, False, True] == [s.success for s in steps]
    assert type(steps[0].reward) is float
    assert type(steps[0].terminated) is bool
    assert steps[2].metrics == {"turn": 3.0, "metrics_left_out": 1.0}  # the other is not finite
    assert (process_of(start) == os.getpid()) is not isolate


FAILURES = [
    ("raise", "raised", "KeyError: 'no such\\nthing'"),
    ("raise unprintable", "raised", "Unprintable"),
    ("sys.exit", "raised", "SystemExit: 4"),
    ("nan", "reward_not_finite", "reward is nan"),
    ("infinite", "reward_not_finite", "reward is inf"),
    ("huge", "reward_not_finite", "reward is inf"),
    ("reward as text", "bad_result", "reward is a str"),
    ("observation as number", "bad_result", "observation is a int"),
    ("observation as array", "bad_result", "observation is a ndarray"),
    ("half a character", "bad_result", "observation cannot be encoded"),
    ("terminated as text", "bad_result", "terminated is a str"),
    ("truncated as None", "bad_result", "truncated is a NoneType"),
    ("four", "bad_result", "step's answer is a tuple, not a tuple (observation, reward"),
    ("info as list", "bad_result", "info is a list"),
    ("actions as text", "bad_result", 'info["admissible"] is a str'),
    ("actions as numbers", "bad_result", 'info["admissible"] is a int'),
    ("blank action", "bad_result", 'info["admissible"] holds a blank action'),
    ("action twice", "bad_result", "holds an action twice: 'go'"),
    ("success as number", "bad_result", 'info["success"] is a int'),
    ("error type as number", "bad_result", 'info["error_type"] is a int, not a str'),
    ("metrics as list", "bad_result", 'info["metrics"] is a list'),
    ("duration below 0", "bad_result", 'info["steps_taken"] is -1, not a number of steps'),
    ("half a step", "bad_result", 'info["steps_taken"] is 0.5, not a number of steps'),
]


@pytest.mark.parametrize("isolate", [False, True])
def test_a_failure_is_named_and_costs_one_episode(isolate: bool) -> None:
    async def play(pool: HostPool) -> None:
        for action, error_type, text in FAILURES:
            with pytest.raises(EnvironmentFailure) as caught:
                await episode(pool, spec(isolate=isolate), "go", action)
            assert caught.value.error_type == error_type, action
            assert text in str(caught.value)
            assert str(caught.value).startswith(f"environment {OBEY}: ")
            assert "\n" not in str(caught.value)
            results = await episode(pool, spec(isolate=isolate), "go", "go", "go")
            assert results[-1].terminated

    run(play)


def test_a_failure_in_reset() -> None:
    async def play(pool: HostPool) -> None:
        for isolate in (False, True):
            with pytest.raises(EnvironmentFailure, match=r"Obey\(on_reset='raise'\): reset raised KeyError") as caught:
                await episode(pool, spec(isolate=isolate, on_reset="raise"))
            assert caught.value.error_type == "raised"
            with pytest.raises(EnvironmentFailure, match=r"cannot be made: KeyError") as caught:
                await episode(pool, spec(isolate=isolate, on_make="raise"))
            assert caught.value.error_type == "raised"

    run(play)


@pytest.mark.parametrize(
    ("action", "error_type", "text"),
    [
        ("os._exit", "died", "its process exited with status 3 during step"),
        ("SIGKILL", "died", "killed by SIGKILL"),
        ("segfault", "died", "killed by SIGSEGV"),
        ("close everything", "died", "during step"),
        ("hang in python", "timeout", "step gave no answer within 2 s"),
        ("hang in C", "timeout", "step gave no answer within 2 s"),
    ],
)
def test_a_process_that_dies_or_hangs_costs_one_episode(action: str, error_type: str, text: str) -> None:
    async def play(pool: HostPool) -> None:
        (start,) = await episode(pool, spec(timeout_s=2.0))
        with pytest.raises(EnvironmentFailure) as caught:
            await episode(pool, spec(timeout_s=2.0), "go", action)
        assert caught.value.error_type == error_type
        assert text in str(caught.value)
        results = await episode(pool, spec(timeout_s=2.0), "go", "go", "go")
        assert results[-1].terminated
        assert process_of(results[0]) != process_of(start)

    run(play, processes=1)


def test_a_reset_that_hangs_or_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(pool: HostPool) -> None:
        await episode(pool, spec())
        monkeypatch.setattr(child_process, "START_SECONDS", 3.0)
        for where in ("on_reset", "on_make"):
            with pytest.raises(EnvironmentFailure, match="gave no answer within 3 s") as caught:
                await episode(pool, spec(timeout_s=1.0, **{where: "hang in python"}))
            assert caught.value.error_type == "timeout"
            monkeypatch.setattr(child_process, "START_SECONDS", 60.0)
            with pytest.raises(EnvironmentFailure, match="exited with status 3") as caught:
                await episode(pool, spec(**{where: "os._exit"}))
            assert caught.value.error_type == "died"
            monkeypatch.setattr(child_process, "START_SECONDS", 3.0)

    run(play)


def test_what_an_environment_prints_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    results = run(lambda pool: episode(pool, spec(timeout_s=60.0), "print gigabytes", "go"))
    assert len(results) == 3
    assert capfd.readouterr() == ("", "")


def test_what_an_environment_started_ends_with_it(tmp_path: Path) -> None:
    async def play(pool: HostPool) -> None:
        file = tmp_path / "pids"
        with pytest.raises(EnvironmentFailure) as caught:
            await episode(pool, spec(timeout_s=5.0, file=str(file)), "hang with children")
        assert caught.value.error_type == "timeout"
        pids = [int(pid) for pid in file.read_text().split()]
        assert len(pids) == 3
        wait_for(lambda: not any(map(psutil.pid_exists, pids)))
        with pytest.raises(EnvironmentFailure) as caught:
            await episode(pool, spec(file=str(tmp_path / "pid")), "exit with a child")
        assert caught.value.error_type == "died"
        wait_for(lambda: not psutil.pid_exists(int((tmp_path / "pid").read_text())))

    run(play)


def test_a_process_killed_between_two_episodes_costs_none() -> None:
    async def play(pool: HostPool) -> None:
        (first,) = await episode(pool, spec())
        os.kill(process_of(first), signal.SIGKILL)
        # Its first thread is a zombie before the others have ended; nobody can be told its exit code until then.
        wait_for(lambda: psutil.Process(process_of(first)).status() == psutil.STATUS_ZOMBIE)
        (second,) = await episode(pool, spec())
        assert process_of(second) != process_of(first)

    run(play, processes=1)


def test_a_cancelled_episode_gives_its_answer_to_nobody() -> None:
    async def play(pool: HostPool) -> None:
        hangs = asyncio.create_task(episode(pool, spec(timeout_s=1000.0), "hang in python"))
        while not pool._busy or not next(iter(pool._busy))._player.is_alive:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        hangs.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hangs
        results = await episode(pool, spec(timeout_s=1000.0), "go", seed=9)
        assert [r.observation[:3] for r in results] == ["9 0", "9 1"]

    run(play, processes=1)


def test_processes_are_few_and_kept() -> None:
    async def play(pool: HostPool) -> None:
        episodes = [episode(pool, spec(), "go", "go", "go", seed=i) for i in range(50)]
        played = await asyncio.gather(*episodes)
        assert [results[0].observation.split()[0] for results in played] == [str(i) for i in range(50)]
        assert all(results[-1].terminated for results in played)
        used = Counter(process_of(results[0]) for results in played)
        assert 1 <= len(used) <= 3
        before = alive()
        other = await asyncio.gather(*(episode(pool, spec(length=1), "go") for _ in range(3)))
        assert all(results[-1].terminated for results in other)
        wait_for(lambda: len(alive()) <= len(before))

    run(play, processes=3)


def test_failures_among_many_episodes_at_once() -> None:
    async def play(pool: HostPool) -> None:
        actions = ["go", "raise", "os._exit", "go", "nan", "SIGKILL"] * 5
        played = await asyncio.gather(*(episode(pool, spec(), "go", a) for a in actions), return_exceptions=True)
        expected = {"go": None, "raise": "raised", "os._exit": "died", "nan": "reward_not_finite", "SIGKILL": "died"}
        assert [getattr(p, "error_type", None) for p in played] == [expected[a] for a in actions]
        results = await asyncio.gather(*(episode(pool, spec(), "go", "go", "go") for _ in range(6)))
        assert all(r[-1].terminated for r in results)

    run(play, processes=3)


def test_many_episodes_in_this_process_leave_nothing() -> None:
    async def play(pool: HostPool) -> None:
        async def batch(n: int) -> None:
            played = await asyncio.gather(*(episode(pool, spec(isolate=False), "go", "go", "go", seed=i) for i in range(n)))
            assert all(results[-1].terminated for results in played)

        def count() -> int:
            gc.collect()
            return len(gc.get_objects())

        await batch(200)
        before, processes = count(), alive()
        for _ in range(10):
            await batch(200)
        assert count() - before < 200
        assert alive() == processes

    run(play)


def test_a_closed_pool_has_closed_its_environments(tmp_path: Path) -> None:
    files = [tmp_path / "here", tmp_path / "there"]

    async def play(pool: HostPool) -> None:
        for file in files:
            await episode(pool, spec(isolate=file.name == "there", file=str(file)), "go")
        waiting = asyncio.create_task(episode(pool, spec(timeout_s=1000.0), "hang in python"))
        await asyncio.sleep(0.5)
        pool.close()
        with pytest.raises((EnvironmentFailure, RuntimeError)):
            await waiting
        for isolate in (False, True):
            with pytest.raises(RuntimeError, match="closed"):
                await pool.acquire(spec(isolate=isolate))

    run(play)
    assert [file.read_text() for file in files] == ["closed", "closed"]


def test_no_process_outlives_a_killed_parent(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    code = (
        "from tests.envs.test_host import *\n"
        f"run(lambda pool: episode(pool, spec(timeout_s=1000.0, file={str(file)!r}), 'hang with children'))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for(file.exists)
    pids = [int(pid) for pid in file.read_text().split()]
    everything = [child.pid for child in psutil.Process(parent.pid).children(recursive=True)]
    assert set(pids) < set(everything)  # a guard too
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(psutil.pid_exists, everything)))


def test_ctrl_c_at_the_terminal_is_not_for_environments() -> None:
    async def play(pool: HostPool) -> None:
        (start,) = await episode(pool, spec())
        assert os.getsid(process_of(start)) == process_of(start) != os.getsid(0)

    run(play)


def test_check_environment() -> None:
    for isolate in (False, True):
        check_environment(spec(isolate=isolate))
        with pytest.raises(ConfigError, match=r"task.args: environment .*Obey.* cannot be made: TypeError: .*lenght"):
            check_environment(spec(isolate=isolate, lenght=5))
        with pytest.raises(ConfigError, match=r"task.args.id: environment .* reset raised KeyError"):
            check_environment(spec(isolate=isolate, on_reset="raise"))
        with pytest.raises(ConfigError, match="which is no gymnasium.Env"):
            check_environment(EnvironmentSpec(id="tests.envs.environments_that_fail:nothing", isolate=isolate))
        with pytest.raises(ConfigError, match="did you mean 'Obey'"):
            check_environment(EnvironmentSpec(id=OBEY.replace("Obey", "Obay"), isolate=isolate))
        with pytest.raises(ConfigError, match="unknown environment 'nowhere/FoodPreparation-v0'; .*module:Class of your own"):
            check_environment(EnvironmentSpec(id="nowhere/FoodPreparation-v0", isolate=isolate))
    with pytest.raises(ConfigError, match="its process exited with status 3 during make"):
        check_environment(spec(on_make="os._exit"))


def test_a_limit_that_would_break_off_what_the_environment_ends_itself_is_refused() -> None:
    slow = OBEY.replace("Obey", "Slow")
    with pytest.raises(ConfigError, match=r"task.args.timeout_s: a step of .*Slow may take 45 seconds .* set it to 45 or more"):
        check_environment(EnvironmentSpec(id=slow, timeout_s=44))
    check_environment(EnvironmentSpec(id=slow, timeout_s=45))
    check_environment(EnvironmentSpec(id=slow, timeout_s=44, isolate=False))  # nothing breaks off a step there


def test_an_unknown_id_is_answered_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    import gymnasium
    from gymnasium.envs.registration import EnvSpec

    monkeypatch.setitem(gymnasium.registry, "text/Cleaning-v0", EnvSpec(id="text/Cleaning-v0", entry_point=OBEY))
    check_environment(EnvironmentSpec(id="text/Cleaning-v0", kwargs={"length": 2}, isolate=False))
    with pytest.raises(ConfigError, match="did you mean 'text/Cleaning-v0'"):
        check_environment(EnvironmentSpec(id="text/Cleanig-v0", isolate=False))


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("def make():\n    import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for isolate in (False, True):
        with pytest.raises(EnvironmentProblem, match="needs what is not installed: .*no_such_package"):
            check_environment(EnvironmentSpec(id="needs_more:make", isolate=isolate))


def test_a_specification_that_cannot_be_one() -> None:
    with pytest.raises(ConfigError, match="timeout_s"):
        spec(timeout_s=0.0)
    for odd in ({1: 2}, {"a": object()}, {"a": {1: 2}}):
        with pytest.raises(ConfigError, match="task.args.kwargs"):
            EnvironmentSpec(id=OBEY, kwargs=odd)  # type: ignore[arg-type]
    assert spec(isolate=None).isolated


def test_only_the_built_in_finite_environments_are_played_here_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    import gymnasium
    from gymnasium.envs.registration import EnvSpec

    entries = {"reasoner_ray.envs.text.food:Food": False, "reasoner_ray.envs.textworld:TextWorldGame": True, OBEY: True}
    for entry, isolated in entries.items():
        monkeypatch.setitem(gymnasium.registry, "any/Thing-v0", EnvSpec(id="any/Thing-v0", entry_point=entry))
        assert EnvironmentSpec(id="any/Thing-v0").isolated is isolated
        assert not EnvironmentSpec(id="any/Thing-v0", isolate=False).isolated
