"""Rules, self-feedback and wrappers, on a problem that is not source-term estimation and on the one that is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from reasoner_ray.agents.agdc.cessation import BeliefSummary, Calibration, make_rule
from reasoner_ray.agents.agdc.detection import GoalDetector
from reasoner_ray.agents.agdc.settings import BeliefConfig, CessationConfig, FeedbackConfig
from reasoner_ray.agents.agdc.source_belief import SourceBelief
from reasoner_ray.agents.agdc.wrappers import AGDC, Ceasing, VectorAGDC, _merged
from reasoner_ray.envs.source_term.environment import SourceTerm, SourceTermVector
from reasoner_ray.envs.source_term.settings import SourceTermConfig
from reasoner_ray.errors import ConfigError, DataError
from tests.agents.agdc.toy import Coin, CoinBelief


def summary(spread: list[float], deviation: list[list[float]] | None = None, mass: list[float] | None = None) -> BeliefSummary:
    n = len(spread)
    return BeliefSummary(
        mean=torch.zeros(n, 2),
        deviation=torch.tensor(deviation or [[s, s] for s in spread]),
        spread=torch.tensor(spread),
        mass=torch.tensor(mass or [0.5] * n),
        evidence=torch.zeros(n, 0),
    )


def rule(name: str, threshold: Any = 0.2, calibration: Path | None = None) -> Any:
    return make_rule(CessationConfig(rule=name, threshold=threshold, calibration=None if calibration is None else str(calibration)))


def test_rules_by_hand() -> None:
    assert rule("never").wants(summary([0.0, 1.0])).tolist() == [False, False]
    assert rule("spread", 0.2).wants(summary([0.1, 0.2, 0.3])).tolist() == [True, False, False]
    deviations = [[0.1, 0.5], [0.1, 0.1], [0.3, 0.1]]
    assert rule("deviation", 0.2).wants(summary([0.0] * 3, deviations)).tolist() == [False, True, False]
    assert rule("deviation", (0.2, math.inf)).wants(summary([0.0] * 3, deviations)).tolist() == [True, True, False]
    assert rule("mass", 0.9).wants(summary([0.0] * 2, mass=[0.9, 0.89])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("name", "threshold", "message"),
    [
        ("spread", 0.0, r"threshold: 0\.0 can never be met by rule spread"),
        ("spread", (0.1, 0.2), r"can never be met by rule spread"),
        ("spread", math.nan, r"threshold: nan can never be met by rule spread"),
        ("spread", math.inf, r"rule spread always holds below inf"),
        ("deviation", (0.1, -1.0), r"no deviation is below"),
        ("deviation", (0.1, math.nan), r"no deviation is below"),
        ("deviation", math.nan, r"no deviation is below"),
        ("mass", math.nan, r"threshold: nan can never be met by rule mass"),
        ("mass", 1.5, r"rule mass reads a probability, which is never 1\.5"),
        ("calibrated", 0.9, r"calibration: the rule `calibrated` reads a fit"),
        ("spred", 0.9, r"unknown cessation rule 'spred'; did you mean 'spread'"),
    ],
)
def test_a_rule_that_can_never_hold_is_refused(name: str, threshold: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule(name, threshold)


def test_deviations_that_do_not_fit_the_parameters_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"3 deviations for 2 parameters"):
        rule("deviation", (0.1, 0.2, 0.3)).wants(summary([0.1]))


def test_calibration_finds_the_probabilities_it_was_drawn_from(tmp_path: Path) -> None:
    stream = torch.Generator().manual_seed(0)
    evidence = torch.randn(8_000, 2, generator=stream) * torch.tensor([1.0, 10.0]) + torch.tensor([0.0, 5.0])
    chance = torch.sigmoid(0.5 - 1.5 * evidence[:, 0] + 0.1 * (evidence[:, 1] - 5))
    right = torch.rand(8_000, generator=stream) < chance
    fit = Calibration.fit(evidence, right, ridge=0.0)
    assert float((fit.probability(evidence) - chance).abs().max()) < 0.06
    fit.save(tmp_path / "fit.json")
    assert Calibration.load(tmp_path / "fit.json") == fit
    wants = rule("calibrated", 0.7, tmp_path / "fit.json").wants(summary([math.exp(-2), math.exp(2)]))
    expected = fit.probability(torch.tensor([[-2.0, 0.0], [2.0, 0.0]])) >= 0.7
    assert wants.tolist() == expected.tolist() == [True, False]


def test_broken_calibrations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all right"):
        Calibration.fit(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(DataError, match="no calibration at"):
        Calibration.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"centre": []}')
    with pytest.raises(DataError, match="holds no calibration"):
        Calibration.load(tmp_path / "bad.json")
    with pytest.raises(DataError, match="a calibration of 1 columns reads 2"):
        Calibration([0.0], [1.0], [1.0], 0.0).probability(torch.zeros(1, 2))


class Scripted:
    """A belief whose spread follows a script."""

    n_features = 1

    def __init__(self, spreads: list[list[float]]) -> None:
        self.spreads, self.t = spreads, 0

    def reset(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        self.t = 0

    def update(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        self.t += 1

    def summary(self) -> BeliefSummary:
        return summary(self.spreads[self.t])

    def features(self) -> torch.Tensor:
        return torch.tensor(self.spreads[self.t])[:, None]


def test_self_feedback_by_hand() -> None:
    belief = Scripted([[4.0, 4.0], [2.0, 4.0], [0.1, 0.1], [0.1, 0.3], [0.1, 0.1]])
    feedback = FeedbackConfig(stop=50, step=1, information=2, patience=2)
    detector = GoalDetector(belief, rule("spread", 0.2), feedback, 2)
    everyone, nothing = torch.ones(2, dtype=torch.bool), torch.zeros(2, 1)
    assert detector.begin(everyone, nothing).tolist() == [[4.0], [4.0]]
    first = detector.advance(everyone, nothing)
    assert first.reward.tolist() == pytest.approx([2 * math.log(2) - 1, -1.0])
    second = detector.advance(everyone, nothing)
    assert second.ceased.tolist() == [False, False], "patience asks for two steps in a row"
    third = detector.advance(everyone, nothing)
    assert third.ceased.tolist() == [True, False]
    assert third.reward.tolist() == pytest.approx([49.0, 2 * math.log(0.1 / 0.3) - 1])
    fourth = detector.advance(torch.tensor([False, True]), nothing)
    assert (fourth.ceased.tolist(), fourth.reward[0].item()) == ([False, False], 0.0), "the row of the third step broke off"


@pytest.mark.filterwarnings("ignore:.*(infinity|different from the unwrapped).*")
def test_another_problem_takes_it_on() -> None:
    env = AGDC(Coin(), CoinBelief(1), rule("spread", 0.12), FeedbackConfig(stop=20))
    check_env(env, skip_render_check=True)
    errors, lengths = [], []
    for seed in range(30):
        shown, info = env.reset(seed=seed)
        assert shown.shape == (6,)
        over = False
        while not over:
            uncertain = int(shown[5] > shown[4])  # flip the coin that is known less
            shown, reward, terminated, truncated, info = env.step(uncertain)
            over = terminated or truncated
        assert terminated == info["ceased"]
        if terminated:
            assert reward == 19
            errors.append(np.abs(info["estimate"] - info["bias"]).max())
            lengths.append(env.unwrapped.flips)  # type: ignore[attr-defined]
    assert len(errors) > 20
    assert max(lengths) > min(lengths), "the agent stops when it knows, not at a fixed time"
    assert float(np.mean(errors)) < 0.1


@pytest.mark.parametrize("rule_name", ["spread", "never"])
def test_many_at_once_end_and_begin_like_each_alone(rule_name: str) -> None:
    n, detect = 3, rule(rule_name, 0.12)
    vector = VectorAGDC(SyncVectorEnv([Coin] * n), CoinBelief(n), detect, FeedbackConfig(stop=20))
    singles = [AGDC(Coin(), CoinBelief(1), detect, FeedbackConfig(stop=20)) for _ in range(n)]
    seen, _ = vector.reset(seed=5)
    for i, env in enumerate(singles):
        assert np.array_equal(env.reset(seed=5 + i)[0], seen[i])
    over, endings = [False] * n, 0
    for t in range(150):
        actions = np.array([(t // 3 + i) % 2 for i in range(n)])
        seen, rewards, terminated, truncated, infos = vector.step(actions)
        for i, env in enumerate(singles):
            if over[i]:  # begins anew; the flips of an environment that ran on unseen differ, its episode does not depend on them
                assert (rewards[i], terminated[i], truncated[i]) == (0, False, False)
                env.unwrapped.np_random.bit_generator.state = vector.unwrapped.envs[i].np_random.bit_generator.state  # type: ignore[attr-defined]
                _adopt(env, vector, i)
                over[i] = False
                continue
            shown, reward, end, cut, info = env.step(actions[i])
            assert np.allclose(shown, seen[i])
            assert (reward, end, cut, info["ceased"]) == (pytest.approx(rewards[i]), terminated[i], truncated[i], infos["ceased"][i])
            over[i] = end or cut
            endings += over[i]
    assert endings >= 6


def _adopt(env: AGDC, vector: VectorAGDC, i: int) -> None:
    """Go on in ``env`` from where environment ``i`` of ``vector`` has just begun."""
    inner: Any = env.unwrapped
    twin: Any = vector.unwrapped.envs[i]  # type: ignore[attr-defined]
    inner.bias, inner.flips = twin.bias, twin.flips
    belief: Any = env.detector.belief
    everyone = torch.ones(1, dtype=torch.bool)
    belief.counts[:] = vector.detector.belief.counts[i]  # type: ignore[attr-defined]
    env.detector._held[everyone], env.detector._elapsed[everyone] = 0, 0


class Drawn(CoinBelief):
    """Keeps the seed that it is given."""

    def seed(self, seed: int) -> None:
        self.seeded = seed


def test_a_belief_draws_other_numbers_than_its_environment() -> None:
    belief = Drawn(1)
    env = AGDC(Coin(), belief, rule("never"), FeedbackConfig())
    env.reset(seed=7)
    first = belief.seeded
    env.reset(seed=8)
    assert len({first, belief.seeded, 7, 8}) == 4
    env.reset(seed=7)
    assert belief.seeded == first, "a seed repeats it"


def test_a_seed_of_each_episode_repeats_beliefs_too() -> None:
    belief = Drawn(2)
    env = VectorAGDC(SyncVectorEnv([Coin] * 2), belief, rule("never"), FeedbackConfig())
    seeds = []
    for seed in ([1, 2], [1, 2], [1, 3], 1, 1, [None, None]):
        env.reset(seed=seed)
        seeds.append(belief.seeded)
    assert seeds[0] == seeds[1] and seeds[3] == seeds[4] == seeds[5], "the same again; none leaves it"
    assert len({seeds[0], seeds[2], seeds[3]}) == 3


def test_infos_of_those_who_go_on_survive_another_ones_end() -> None:
    env = Ceasing(SourceTermVector(3, SourceTermConfig()))
    env.reset(seed=2)
    *_, before = env.step(np.zeros(3, dtype=int))
    env.cease(np.array([False, True, False]))
    *_, infos = env.step(np.zeros(3, dtype=int))
    assert infos["travelled"].tolist() == [1.0, 0.0, 1.0], "the one that was ended has just begun"
    assert np.array_equal(infos["source"][[0, 2]], before["source"][[0, 2]])
    assert not np.array_equal(infos["source"][1], before["source"][1])
    assert infos["_travelled"].all()


def test_infos_are_merged_row_by_row() -> None:
    mask = np.array([True, False])
    stepped = {"way": np.array([1.0, 2.0]), "_way": np.array([True, True]), "deep": {"a": np.array([[1, 1], [2, 2]])}, "note": "old"}
    begun = {"deep": {"a": np.array([[5, 5], [0, 0]])}, "bias": np.array([9.0, 0.0]), "_bias": np.array([True, False]), "note": "new"}
    merged = _merged(stepped, begun, mask)
    assert (merged["way"].tolist(), merged["_way"].tolist()) == ([0.0, 2.0], [False, True])
    assert (merged["bias"].tolist(), merged["_bias"].tolist()) == ([9.0, 0.0], [True, False])
    assert merged["deep"]["a"].tolist() == [[5, 5], [2, 2]]
    assert merged["note"] == "new"


def test_a_vector_that_begins_anew_in_the_same_step_is_refused() -> None:
    env = SyncVectorEnv([Coin], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ConfigError, match="NEXT_STEP"):
        VectorAGDC(env, CoinBelief(1), rule("never"), FeedbackConfig())
    with pytest.raises(ConfigError, match="observations that are vectors"):
        AGDC(gymnasium.make("Blackjack-v1"), CoinBelief(1), rule("never"), FeedbackConfig())


@pytest.mark.filterwarnings("ignore:.*(infinity|different from the unwrapped).*")
def test_the_search_for_a_source_ends_itself() -> None:
    config = SourceTermConfig(max_steps=60)
    belief = SourceBelief(BeliefConfig(particles=150), config, 4, seed=1)
    env = VectorAGDC(SourceTermVector(4, config), belief, rule("spread", 3.0), FeedbackConfig(information=1.0), observe="features")
    shown, infos = env.reset(seed=3)
    assert shown.shape == (4, SourceBelief.n_features)
    assert env.single_observation_space.shape == (SourceBelief.n_features,)
    stops = 0
    for _ in range(80):
        towards = shown[:, 2:4]  # walk to the estimate
        actions = np.where(
            np.abs(towards[:, 0]) > np.abs(towards[:, 1]), np.where(towards[:, 0] > 0, 0, 2), np.where(towards[:, 1] > 0, 1, 3)
        )
        shown, _, terminated, _, infos = env.step(actions)
        assert np.isfinite(shown).all()
        assert np.abs(shown).max() < 12
        assert np.array_equal(terminated, infos["ceased"])
        stops += int(terminated.sum())
    assert stops >= 2
    single = AGDC(SourceTerm(config), SourceBelief(BeliefConfig(particles=50), config, 1), rule("never"), FeedbackConfig(), observe="raw")
    check_env(single, skip_render_check=True)


class Broken(Coin):
    """Its second and third observation are no numbers."""

    def flip(self, coin: int) -> np.ndarray:
        return super().flip(coin) if self.flips not in (1, 2) else np.array([math.nan, math.inf], dtype=np.float32)


class Deaf(CoinBelief):
    """Passes over what it cannot read."""

    def update(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        super().update(mask & torch.isfinite(observation).all(-1), observation)


@pytest.mark.parametrize("observe", ["both", "raw"])
def test_what_is_no_number_reaches_no_policy_and_is_counted(observe: Any) -> None:
    env = AGDC(Broken(), Deaf(1), rule("never"), FeedbackConfig(), observe=observe)
    env.reset(seed=0)
    for _ in range(2):
        shown, *_ = env.step(1)
        assert shown[:2].tolist() == [0.0, 0.0]
        assert np.isfinite(shown).all()
    assert env.step(1)[0][0] == 1
    assert env.detector.faults() == {"unreadable": 2}
    vector = VectorAGDC(SyncVectorEnv([Broken] * 2), Deaf(2), rule("never"), FeedbackConfig(), observe=observe)
    vector.reset(seed=0)
    shown, *_ = vector.step(np.array([1, 1]))
    assert shown[:, :2].tolist() == [[0.0, 0.0]] * 2
    assert vector.detector.unreadable == 2


def test_what_is_rendered_shows_the_belief() -> None:
    config = SourceTermConfig(max_steps=5)
    inner = SourceTerm(config, render_mode="rgb_array")
    env = AGDC(inner, SourceBelief(BeliefConfig(particles=60), config, 1), rule("never"), FeedbackConfig())
    env.reset(seed=1)
    for _ in range(2):
        filter_: Any = env.detector.belief.filter  # type: ignore[attr-defined]
        assert inner.particles is not None
        assert np.array_equal(inner.particles, filter_.particles[0].numpy())
        with_belief, inner.particles = env.render(), None
        assert not np.array_equal(with_belief, env.render()), "the picture has the particles in it"
        env.step(0)
    silent = AGDC(SourceTerm(config), SourceBelief(BeliefConfig(particles=60), config, 1), rule("never"), FeedbackConfig())
    silent.reset(seed=1)
    assert silent.unwrapped.particles is None, "where nothing is rendered nothing is copied"  # type: ignore[attr-defined]
