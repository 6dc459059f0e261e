"""Names, settings and what an algorithm asks of the learner."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reasoner_ray.algorithms import (
    Algorithm,
    AlgorithmSettings,
    CriticSettings,
    algorithm_names,
    describe_algorithm,
    get_algorithm,
    list_algorithms,
    register_algorithm,
)
from reasoner_ray.config import parse_config
from reasoner_ray.credit import Credit, hierarchical_gae
from reasoner_ray.errors import ConfigError
from reasoner_ray.losses import Denominators, gather_inputs
from reasoner_ray.trajectory import TokenStreams
from tests.credit.streams import make_streams, make_trajectory, random_streams

OWN = "tests.algorithms.own:Reinforce"
BUILT_IN = ["grpo", "ntpo", "poad", "ppo_action", "rloo"]


def test_the_five_algorithms_are_registered() -> None:
    assert {*BUILT_IN, "etpo"} <= set(algorithm_names())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("poda", "algorithm.name: unknown algorithm 'poda'; did you mean 'poad'?"),
        ("nowhere_at_all:X", "cannot import 'nowhere_at_all'"),
        ("tests.algorithms.own:Reinforced", "has no 'Reinforced'; did you mean 'Reinforce'?"),
        ("tests.algorithms.own:not_an_algorithm", "not a subclass of reasoner_ray.algorithms.Algorithm"),
        ("tests.algorithms.own:Unfinished", "does not define estimate, name"),
    ],
)
def test_a_wrong_name_is_explained(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match="algorithm.name") as caught:
        get_algorithm(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("poad", {"gamma_tokn": 1}, "algorithm.settings.gamma_tokn: unknown setting of poad; did you mean 'gamma_token'?"),
        ("grpo", {"gamma_token": 1}, "algorithm.settings.gamma_token: unknown setting of grpo"),
        ("poad", {"gamma_token": 1.5}, "algorithm.settings.gamma_token: Input should be less than or equal to 1 (got 1.5)"),
        ("rloo", {"kl_in": "both"}, "algorithm.settings.kl_in: Input should be 'loss' or 'reward'"),
        ("ntpo", {"gamma_token": 0.9}, "algorithm.settings: ntpo treats all tokens alike"),
    ],
)
def test_wrong_settings_are_refused_with_their_path(name: str, raw: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"algorithm": {"name": name, "settings": raw}})
    assert message in str(caught.value)


def test_impossible_combinations_are_refused_by_the_job() -> None:
    with pytest.raises(ConfigError, match="poad needs a critic"):
        parse_config({"algorithm": {"name": "poad"}, "learner": {"critic": "none"}})
    with pytest.raises(ConfigError, match="compares the samples of a group"):
        parse_config({"algorithm": {"name": "rloo"}, "trainer": {"samples_per_task": 1}})


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_description_names_every_part(name: str) -> None:
    text = describe_algorithm(name)
    for part in ("Estimator:", "When:", "How it fails:", "Needs:", "Settings", "clip_low", "arXiv"):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 180


def test_all_are_listed_with_what_they_are() -> None:
    lines = list_algorithms().splitlines()
    assert [line.split()[0] for line in lines] == algorithm_names()
    assert all(len(line.split()) > 3 for line in lines)


def test_vetted_defaults() -> None:
    poad = get_algorithm("poad").settings({})
    assert isinstance(poad, CriticSettings) and poad.normalize_advantages
    assert poad.model_dump().items() >= {"gamma_token": 1.0, "gamma_action": 0.99, "lambda_token": 1.0, "lambda_action": 0.95}.items()
    assert not get_algorithm("grpo").settings({}).normalize_advantages


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_an_algorithm_asks_of_the_learner(name: str) -> None:
    algorithm = get_algorithm(name)
    plain, in_loss = algorithm.settings({}), algorithm.settings({"kl_coef": 0.1})
    in_reward = algorithm.settings({"kl_coef": 0.1, "kl_in": "reward"})
    assert algorithm.needs_critic is (name in ("poad", "ntpo", "ppo_action"))
    assert algorithm.needs_group is (name in ("grpo", "rloo"))
    assert [algorithm.wants_reference(s) for s in (plain, in_loss, in_reward)] == [False, True, True]
    assert [algorithm.wants_old_logprobs(s) for s in (plain, in_loss, in_reward)] == [False, False, True]
    assert algorithm.wants_bootstrap(plain) == ("unended" if algorithm.needs_critic else "none")
    if algorithm.needs_critic:
        assert algorithm.wants_bootstrap(algorithm.settings({"bootstrap_truncated": True})) == "truncated"


def test_kl_estimator_follows_its_place() -> None:
    assert AlgorithmSettings(kl_in="loss").kl_kind == "k3"
    assert AlgorithmSettings(kl_in="reward").kl_kind == "k1"
    assert AlgorithmSettings(kl_in="reward", kl_estimator="k2").kl_kind == "k2"


def test_ones_own_algorithm_by_dotted_path() -> None:
    config = parse_config({"algorithm": {"name": OWN, "settings": {"clip_high": 0.3}}, "learner": {"critic": "none"}})
    algorithm = get_algorithm(config.algorithm.name)
    chosen = algorithm.settings(config.algorithm.settings)
    streams = make_streams(make_trajectory([(2, 1.0)]), make_trajectory([(2, 0.0)]))
    credit = algorithm.credit(streams, chosen)
    assert credit.advantages.tolist() == [0.5, 0.5, -0.5, -0.5]
    logprobs = torch.full((4,), -0.5, requires_grad=True)
    weights, index = torch.ones(4), torch.arange(4)
    counts = Denominators.of(streams, weights)
    inputs = gather_inputs(streams, credit, weights, index, counts, logprobs=logprobs, entropy=None, values=None)
    algorithm.loss(inputs, chosen).loss.backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-0.125, -0.125, 0.125, 0.125]
    assert "REINFORCE with the mean return" in describe_algorithm(OWN)


def test_ones_own_algorithm_by_registration() -> None:
    class Constant(Algorithm[AlgorithmSettings]):
        """Advantage 1 everywhere."""

        name = "test_constant"

        def estimate(self, streams: TokenStreams, settings: AlgorithmSettings) -> Credit:
            return Credit(advantages=torch.ones(streams.n_tokens), returns=streams.rewards)

    assert register_algorithm(Constant) is Constant
    assert isinstance(get_algorithm("test_constant"), Constant)

    class Other(Constant):
        pass

    with pytest.raises(ValueError, match="registered already"):
        register_algorithm(Other)


def test_kl_in_the_reward_is_subtracted_at_each_token() -> None:
    streams = random_streams([make_trajectory([(2, 1.0)]), make_trajectory([(1, 0.0)])])
    algorithm = get_algorithm("rloo")
    chosen = algorithm.settings({"kl_coef": 0.5, "kl_in": "reward"})
    assert streams.old_logprobs is not None and streams.ref_logprobs is not None
    rewards = streams.rewards - 0.5 * (streams.old_logprobs - streams.ref_logprobs)
    expected = algorithm.credit(replace(streams, rewards=rewards), algorithm.settings({}))
    torch.testing.assert_close(algorithm.credit(streams, chosen).advantages, expected.advantages)
    with pytest.raises(ValueError, match="KL penalty in the reward"):
        algorithm.credit(replace(streams, old_logprobs=None), chosen)


def test_poad_and_ntpo_are_settings_of_one_kernel() -> None:
    streams = random_streams([make_trajectory([(3, 1.0), (2, -1.0)]), make_trajectory([(4, 0.5)])])
    for name, gammas in {"poad": (1.0, 0.99, 1.0, 0.95), "ntpo": (0.99, 0.99, 0.95, 0.95)}.items():
        algorithm = get_algorithm(name)
        keys = ("gamma_token", "gamma_action", "lambda_token", "lambda_action")
        expected = hierarchical_gae(streams, **dict(zip(keys, gammas, strict=True)), bootstrap_truncated=False)
        torch.testing.assert_close(algorithm.credit(streams, algorithm.settings({})).advantages, expected.advantages)
