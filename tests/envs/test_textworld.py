"""TextWorld games: generated once, won by their own walkthroughs, played in processes of their own."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from gymnasium.utils.env_checker import check_env

from reasoner_ray.envs.host import HostPool, check_environment
from reasoner_ray.envs.player import EnvironmentSpec
from reasoner_ray.errors import ConfigError, EnvironmentProblem

pytest.importorskip("textworld", reason="TextWorld is not installed: pip install textworld==1.7.0")

from reasoner_ray.envs.textworld import Knobs, TextWorldGame, game_file

pytestmark = pytest.mark.filterwarnings("ignore:Game .* is not fully supported")  # jericho's, of every game but its own

ENTRY = "reasoner_ray.envs.textworld:TextWorldGame"
SMALL = {"nb_rooms": 2, "nb_objects": 3, "quest_length": 3, "games": 2}
KNOBS = Knobs(nb_rooms=2, nb_objects=3, quest_length=3)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache folder for the module: a game takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("REASONER_RAY_CACHE", str(folder))
        yield folder


def walkthrough(seed: int) -> list[str]:
    commands: list[str] = json.loads(game_file(KNOBS, seed).with_suffix(".json").read_text())["metadata"]["walkthrough"]
    return commands


@pytest.mark.parametrize("number", [0, 1])
def test_a_game_is_won_by_its_walkthrough(number: int) -> None:
    env = TextWorldGame(**SMALL)
    observation, info = env.reset(options={"game": number})
    assert walkthrough(number)
    assert "You are carrying" in observation
    total = 0.0
    for command in walkthrough(number):
        assert command in info["admissible"]
        observation, reward, terminated, truncated, info = env.step(command)
        assert not info["invalid"]
        assert not truncated
        total += reward
    assert (terminated, info["success"], total) == (True, True, 1.0)
    assert "***" not in observation
    env.close()


def test_every_admissible_command_is_understood_and_nothing_is_left_in_the_text() -> None:
    env, source = TextWorldGame(**SMALL, max_steps=1000), random.Random(0)
    for seed in range(4):
        observation, info = env.reset(seed=seed)
        for _ in range(25):
            assert info["admissible"]
            assert len(set(info["admissible"])) == len(info["admissible"])
            assert ">" not in observation
            assert "-0/" not in observation
            observation, _, terminated, _, info = env.step(source.choice(info["admissible"]))
            assert not info["invalid"]
            if terminated:
                break
    env.close()


def test_what_is_no_command_is_invalid_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = TextWorldGame(**SMALL)
    before, _ = env.reset(seed=0)
    for command in (
        "",
        "dance",
        "save",
        "look. save",
        "look then save",
        "script on",
        "quit",
        "restart",
        "undo",
        "take",
        "tw-trace-actions",
        "é",
    ):
        observation, reward, terminated, _, info = env.step(command)
        assert info["invalid"], command
        assert (reward, terminated) == (0.0, False)
        assert before.splitlines()[-2:] == observation.splitlines()[-2:]
    assert not env.step("look\n")[4]["invalid"]
    assert not list(tmp_path.iterdir())
    env.close()


def test_the_step_limit_truncates() -> None:
    env = TextWorldGame(**SMALL, max_steps=2)
    env.reset(seed=0)
    assert [env.step("look")[2:4] for _ in range(2)] == [(False, False), (False, True)]
    env.close()


def test_the_same_seed_is_the_same_game_and_others_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = (game_file(KNOBS, seed).with_suffix(".json").read_text() for seed in (0, 1))
    monkeypatch.setenv("REASONER_RAY_CACHE", str(tmp_path))
    assert game_file(KNOBS, 0).is_relative_to(tmp_path)
    assert game_file(KNOBS, 0).with_suffix(".json").read_text() == first != other
    env = TextWorldGame(**SMALL)
    texts = [env.reset(seed=seed) for seed in (0, 1, 2, 3, 4, 5, 0)]
    assert texts[0] == texts[-1]
    assert len({observation for observation, _ in texts}) == 2
    env.close()


def test_processes_that_need_a_game_at_once_generate_it_once(tmp_path: Path) -> None:
    code = (
        "import pathlib, reasoner_ray.envs.textworld as t\n"
        "make = t._generate\n"
        "def count(knobs, seed, file):\n"
        f"    open({str(tmp_path / 'made')!r}, 'a').write('x')\n"
        "    make(knobs, seed, file)\n"
        "t._generate = count\n"
        f"t.settings.cache_dir = lambda: pathlib.Path({str(tmp_path)!r})\n"
        "env = t.TextWorldGame(nb_rooms=1, nb_objects=1, quest_length=1, games=1)\n"
        "print(env.reset(seed=0)[1]['admissible'])\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(printed) == 1
    assert (tmp_path / "made").read_text() == "x"


def test_what_a_killed_process_left_is_generated_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REASONER_RAY_CACHE", str(tmp_path))
    folder = game_file(KNOBS, 0).parent
    partial = folder.with_name(f".{folder.name}.partial")
    folder.rename(partial)
    (partial / "game.z8").write_bytes(b"half")
    (partial / "game.json").unlink()
    assert game_file(KNOBS, 0).stat().st_size > 10_000
    assert not partial.exists()


def test_gymnasium_finds_nothing_wrong() -> None:
    env = TextWorldGame(**SMALL, max_steps=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env, skip_render_check=True)
    assert not [str(w.message) for w in caught if "gymnasium" in w.filename or "WARN" in str(w.message)]
    env.close()


def test_hosts_in_processes_of_their_own_play_it() -> None:
    spec = EnvironmentSpec(id=ENTRY, kwargs=SMALL, timeout_s=60.0)
    assert spec.isolated
    check_environment(spec)

    async def play(pool: HostPool, seed: int) -> float:
        host = await pool.acquire(spec)
        try:
            result = await host.reset(seed)
            number = int(any(line in game_text(1) for line in result.observation.splitlines()[:1]))
            total = 0.0
            for command in walkthrough(number):
                assert command in (result.admissible or [])
                result = await host.step(command)
                total += result.reward
            assert result.terminated
            assert result.success
            return total
        finally:
            await host.release()

    async def main() -> list[float]:
        pool = HostPool(2)
        try:
            return await asyncio.gather(*(play(pool, seed) for seed in range(6)))
        finally:
            pool.close()

    assert asyncio.run(main()) == [1.0] * 6


def game_text(number: int) -> str:
    objective: str = json.loads(game_file(KNOBS, number).with_suffix(".json").read_text())["objective"]
    return objective


def test_numbers_out_of_range_and_a_compiler_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("nb_rooms", 0), ("quest_length", 1.5), ("first_seed", -1), ("games", 2**40)):
        with pytest.raises(ConfigError, match=name):
            TextWorldGame(**{name: value})
    with pytest.raises(ValueError, match="no game 2"):
        TextWorldGame(**SMALL).reset(options={"game": 2})
    monkeypatch.setenv("INFORM_HOME", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="Inform 7"):
        game_file(KNOBS, 77)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(EnvironmentProblem, match="pip install textworld==1.7.0"):
        TextWorldGame()
