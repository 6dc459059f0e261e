"""The second problem of the module: an unknown number of objects in rooms. Its belief against every set of cells, counted out."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from PIL import Image

pytest.importorskip("minigrid", reason="ObjectSearch needs MiniGrid: pip install minigrid==3.2.0")

from reasoner_ray.agents.agdc.evaluate import FIRST_SEED
from reasoner_ray.agents.agdc.launch import evaluate, make_arena
from reasoner_ray.agents.agdc.object_search import FIRST, Coverage, ObjectBelief, ObjectSearchProblem
from reasoner_ray.agents.agdc.problem import View
from reasoner_ray.agents.agdc.rllib import algorithm_config, make_search
from reasoner_ray.agents.agdc.settings import AgdcConfig
from reasoner_ray.config import load_config
from reasoner_ray.envs.object_search.environment import DIRECTIONS, ObjectSearch, ObjectSearchVector, floor_of
from reasoner_ray.envs.object_search.settings import ObjectSearchConfig
from reasoner_ray.errors import ConfigError

JOB = Path(__file__).parents[3] / "jobs" / "agdc" / "object_search.yaml"
SMALL = ObjectSearchConfig(size=7, most=3, view=3, detection=0.6, max_steps=40)
EVERYONE = torch.ones(1, dtype=torch.bool)


def walk(belief: ObjectBelief, env: ObjectSearch, steps: int, seed: int) -> list[np.ndarray]:
    """Random moves; the observations that the belief has taken in."""
    draw = np.random.default_rng(seed)
    shown = [env.reset(seed=seed)[0]]
    belief.reset(EVERYONE, torch.as_tensor(shown[0])[None])
    for _ in range(steps):
        shown.append(env.step(draw.integers(3))[0])
        belief.update(EVERYONE, torch.as_tensor(shown[-1])[None])
    return shown


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_the_posterior_is_that_of_all_sets_of_cells(seed: int) -> None:
    env, belief = ObjectSearch(SMALL), ObjectBelief(SMALL, 1)
    shown = walk(belief, env, 12, seed)
    n = len(floor_of(SMALL.size, SMALL.view).cells)
    looks, found = np.zeros(n), set()
    for observation in shown:
        seen, hit = np.split(observation[FIRST:], 2)
        looks += seen
        found |= set(np.flatnonzero(hit).tolist())
    left, occupied = np.zeros(SMALL.most + 1), np.zeros(n)
    for r in range(SMALL.most + 1 - len(found)):
        prior = 1 / (SMALL.most + 1) / comb(n, len(found) + r)  # of each set of that many cells
        for cells in combinations(sorted(set(range(n)) - found), r):
            weight = prior * float(np.prod([(1 - SMALL.detection) ** looks[cell] for cell in cells]))
            left[r] += weight
            occupied[list(cells)] += weight
    assert belief.left[0].numpy() == pytest.approx(left / left.sum(), rel=1e-9)
    assert belief.occupied[0].numpy() == pytest.approx(occupied / left.sum(), rel=1e-9, abs=1e-12)
    summary = belief.summary()
    assert float(summary.mass[0]) == pytest.approx(left[0] / left.sum(), rel=1e-5)
    number = (left / left.sum()) @ np.arange(SMALL.most + 1)
    assert float(summary.mean[0, 0]) == pytest.approx(len(found) + number, rel=1e-5)


def test_a_belief_that_is_sure_to_the_extent_that_it_is_right() -> None:
    """Of the times at which it says p that none is left, none is left in a share p."""
    problem = ObjectSearchProblem(AgdcConfig(problem="object_search", objects=SMALL, tolerance=0.5))
    n = 400
    search, belief, policy = problem.search(n), problem.belief(n), Coverage()
    everyone = torch.ones(n, dtype=torch.bool)
    belief.reset(everyone, search.reset(seeds=list(range(FIRST_SEED, FIRST_SEED + n))))
    said, true = [belief.left[:, 0].clone()], [search.left == 0]
    for _ in range(20):
        belief.update(everyone, search.step(policy.act(View(search, belief, torch.zeros(0)))).observation)
        said.append(belief.left[:, 0].clone())
        true.append(search.left == 0)
    probability, truth = torch.cat(said), torch.cat(true).double()
    for low, high in ((0.1, 0.4), (0.4, 0.7), (0.7, 0.95)):
        inside = (probability >= low) & (probability < high)
        assert int(inside.sum()) > 200
        # an episode's moments are alike: 400 of them give a standard error of about 0.025
        assert float(truth[inside].mean()) == pytest.approx(float(probability[inside].mean()), abs=0.08)


def test_a_cell_where_an_object_was_found_holds_no_other() -> None:
    env, belief = ObjectSearch({**SMALL.model_dump(), "detection": 1.0}), ObjectBelief(SMALL.model_copy(update={"detection": 1.0}), 1)
    for seed in range(6):
        walk(belief, env, 30, seed)
        assert int(belief.found[0]) + len(env.hidden) <= SMALL.most
        assert float(belief.occupied[0].sum()) == pytest.approx(float(belief.left[0] @ torch.arange(4.0).double()), abs=1e-9)
        for cell in env.hidden:
            assert float(belief.occupied[0, cell]) > 0, "sharp eyes rule out nothing that is there"


def test_an_observation_that_cannot_be_read_says_nothing() -> None:
    env, belief = ObjectSearch(SMALL), ObjectBelief(SMALL, 1)
    one = torch.ones(1, dtype=torch.bool)
    shown = torch.as_tensor(env.reset(seed=0)[0])[None]
    broken = shown.clone()
    broken[0, 0] = torch.nan
    belief.reset(one, broken)
    prior = belief.left.clone()
    assert torch.isfinite(belief.features()).all()
    belief.update(one, shown)
    known = belief.occupied.clone()
    belief.update(one, broken)
    assert torch.equal(belief.occupied, known) and not torch.equal(belief.left, prior)
    everywhere = shown.clone()
    everywhere[0, FIRST:] = 1.0
    with pytest.raises(ConfigError, match=r"objects\.most: \d+ objects were found where at most 3 can lie"):
        belief.update(one, everywhere)


def test_the_environment_is_one_of_gymnasiums_and_stays_as_it_is() -> None:
    env = gymnasium.make("reasoner_ray.envs:reasoner_ray/ObjectSearch-v0", config={"size": 7, "view": 3}, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)
    first, info = env.reset(seed=4)
    again, _ = env.reset(seed=4)
    assert np.array_equal(first, again)
    assert 0 <= info["left"] <= 4
    many = ObjectSearchVector(3, {"size": 7, "view": 3})
    assert np.array_equal(many.reset(seed=[4, 5, 6])[0][0], first)
    assert not np.array_equal(many.reset(seed=4)[0][1], many.reset(seed=5)[0][0]), "runners do not play each other's episodes"
    with pytest.raises(ConfigError, match=r"ObjectSearch: size: must be odd \(got 8\)"):
        ObjectSearch({"size": 8})


def test_what_is_far_is_as_many_moves_away() -> None:
    floor = floor_of(7, 3)
    draw = np.random.default_rng(0)
    for pose, cell in zip(draw.integers(len(floor.sees), size=20), draw.integers(len(floor.cells), size=20), strict=True):
        steps, here = 0, int(pose)
        while not floor.sees[here, cell]:
            here = int(floor.moves[here, floor.far[floor.moves[here], cell].argmin()])
            steps += 1
        assert steps == floor.far[pose, cell]
    turned = floor.moves[:, 0]
    assert np.array_equal(floor.moves[turned, 1], np.arange(len(turned))), "left and right again"
    assert (floor.sees.sum(-1) >= 1).all(), "an agent sees its own cell"
    assert len(floor.sees) == DIRECTIONS * len(floor.cells)


def small(*overrides: str) -> Any:
    floor = [f"agdc.objects.{key}={value}" for key, value in SMALL.model_dump().items()]
    return load_config(JOB, [*floor, "agdc.episodes_at_once=4", "agdc.hidden=[16]", "tracking.wandb=off", *overrides])


def test_planners_are_evaluated_and_animated(tmp_path: Path) -> None:
    found = {}
    for name in ("random", "coverage", "greedy"):
        found[name] = evaluate(small(f"agdc.policy={name}", "trainer.eval_tasks=40"))
        assert found[name]["eval/success_low"] <= found[name]["eval/success"] <= found[name]["eval/success_high"]
    assert found["coverage"]["eval/success"] > 0.8
    assert found["coverage"]["eval/steps"] < found["random"]["eval/steps"]
    evaluate(small("agdc.policy=coverage", "agdc.objects.max_steps=3", "trainer.eval_tasks=1", f"agdc.gif={tmp_path / 'search.gif'}"))
    with Image.open(tmp_path / "search.gif") as gif:
        assert gif.n_frames == 4  # type: ignore[attr-defined]


def test_runners_play_searches_with_and_without_a_belief() -> None:
    for detect in ("true", "false"):
        config = small(f"agdc.detect={detect}")
        made = algorithm_config(config)
        made.validate()
        env: Any = make_search({**made.env_config, "num_envs": 3})
        shown, _ = env.reset(seed=1)
        ended = 0
        for _ in range(SMALL.max_steps + 5):
            shown, _, terminated, truncated, _ = env.step(env.action_space.sample())
            ended += int(terminated.sum()) + int(truncated.sum())
        assert env.observation_space.contains(shown)
        assert np.abs(shown).max() <= 5
        assert ended >= 3, "at the limit at the latest"
    assert make_arena(config.agdc).rule.wants(ObjectBelief(SMALL, 2).summary()).tolist() == [False, False]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["agdc.algorithm=ddpg"], r"agdc\.algorithm: .* object_search has moves"),
        (["agdc.tolerance=1"], r"agdc\.tolerance: .* set agdc\.tolerance=0\.5"),
        (["agdc.objects.view=4"], r"agdc\.objects\.view: .*must be odd"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(JOB, overrides)


def test_an_unknown_problem_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"agdc\.problem: unknown problem 'object_serach'; did you mean 'object_search'"):
        make_arena(load_config(JOB, ["agdc.problem=object_serach"]).agdc)


@pytest.mark.long
def test_a_search_for_objects_is_learnt_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reasoner_ray.cli"]
    options = [
        "agdc.objects.size=7",
        "agdc.objects.view=3",
        "agdc.objects.max_steps=100",
        "seed=1",
        "tracking.wandb=off",
        f"out={tmp_path}",
    ]
    evaluations = ["trainer.steps=30", "trainer.eval_every=0", "trainer.eval_tasks=100"]
    subprocess.run([*command, "train", str(JOB), *options, *evaluations], check=True, timeout=280)
    run = load_config(tmp_path / "agdc-object-search" / "config.yaml")
    trained = evaluate(run.model_copy(update={"model": run.model.model_copy(update={"path": str(run.run_dir / "model")})}))
    at_random = evaluate(run.model_copy(update={"agdc": run.agdc.model_copy(update={"policy": "random"})}))
    assert trained["eval/success"] > 0.7 > at_random["eval/success"] + 0.1
    assert trained["eval/correct_stops"] > 0.9, "95 % sure is right in 95 % of the cases"
    assert trained["eval/steps"] < at_random["eval/steps"]
