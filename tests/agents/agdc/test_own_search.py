"""A reader's own environment with a belief of their own, as the README shows it (``my_search.py``): AGDC on it, and PPO of RLlib."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from reasoner_ray.agents.agdc.cessation import BeliefSummary, make_rule
from reasoner_ray.agents.agdc.settings import CessationConfig
from reasoner_ray.errors import ConfigError
from tests.agents.agdc import my_search


@pytest.mark.filterwarnings("ignore:.*(infinity|different from the unwrapped).*")
def test_the_agent_ends_its_search_when_it_knows() -> None:
    env = my_search.make()
    check_env(env, skip_render_check=True)
    errors, lengths = [], []
    for seed in range(20):
        shown, info = env.reset(seed=seed)
        over = False
        while not over:
            shown, reward, terminated, truncated, info = env.step(int(shown[5] > shown[4]))  # the coin that is known less
            over = terminated or truncated
        if terminated:
            assert reward == 19
            errors.append(np.abs(info["estimate"] - info["bias"]).max())
            lengths.append(env.unwrapped.flips)
    assert len(errors) >= 15
    assert max(lengths) > min(lengths)
    assert float(np.mean(errors)) < 0.1


def test_summaries_fill_in_what_a_belief_leaves_out() -> None:
    said = BeliefSummary(torch.zeros(2, 2), torch.tensor([[0.3, 0.4], [1.0, 0.0]]))
    assert said.spread.tolist() == pytest.approx([0.5, 1.0])
    assert said.evidence.shape == (2, 0)
    assert said.evidence_vector().tolist() == [[pytest.approx(math.log(0.5))], [0.0]]
    assert make_rule(CessationConfig(rule="spread", threshold=0.7)).wants(said).tolist() == [True, False]
    with pytest.raises(ConfigError, match=r"rule mass reads BeliefSummary\.mass, which this belief leaves out"):
        make_rule(CessationConfig(rule="mass", threshold=0.7)).wants(said)


@pytest.mark.slow
def test_ppo_of_rllib_trains_on_it(ray_cluster: Any) -> None:
    algorithm = my_search.config.build_algo()
    try:
        found = algorithm.train()
    finally:
        algorithm.stop()
    runners, learner = found["env_runners"], found["learners"]["default_policy"]
    assert runners["num_env_steps_sampled"] >= 512
    assert 1 <= runners["episode_len_mean"] < 100, "some searches were ended before their time ran out"
    assert math.isfinite(float(learner["total_loss"]))
