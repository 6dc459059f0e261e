"""The deterministic-actor learner by hand, and learners on DeepSpeed against RLlib's own, one update on the same batch."""

from __future__ import annotations

from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.dqn.dqn import DQNConfig
from ray.rllib.algorithms.ppo.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME
from torch import nn

from reasoner_ray.agents.agdc.ddpg import DDPGConfig, DDPGModule
from reasoner_ray.agents.agdc.deepspeed_learner import with_deepspeed
from reasoner_ray.errors import ConfigError

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (5,), np.float32)
ACTIONS = {"ppo": spaces.Discrete(4), "dqn": spaces.Discrete(4), "ddpg": spaces.Box(-1, 1, (2,), np.float32)}
SIZE = 24


def configuration(name: str, **settings: Any) -> Any:
    made = {"ppo": PPOConfig, "dqn": DQNConfig, "ddpg": DDPGConfig}[name]()
    made.framework("torch").debugging(seed=3)
    if name != "ddpg":
        made.rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[16]))
    own = {"ppo": {"num_epochs": 1}, "dqn": {"num_atoms": 1}, "ddpg": {"hidden": (16,), "target_noise": 0.0}}[name]
    return made.training(**{"lr": 1e-2, "grad_clip": 0.5, "grad_clip_by": "global_norm", **own, **settings})


def build(made: Any, name: str) -> Any:
    """A learner that stands alone."""
    learner = made.build_learner(spaces={DEFAULT_MODULE_ID: (OBSERVATIONS, ACTIONS[name])})
    learner.build()
    return learner


def batch(name: str, seed: int = 0) -> MultiAgentBatch:
    draw = np.random.default_rng(seed)
    columns: dict[str, Any] = {Columns.OBS: draw.normal(size=(SIZE, 5)), Columns.REWARDS: draw.normal(size=SIZE)}
    columns[Columns.ACTIONS] = draw.uniform(-1, 1, size=(SIZE, 2)) if name == "ddpg" else draw.integers(4, size=SIZE)
    if name == "ppo":
        logits = draw.normal(size=(SIZE, 4))
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        columns[Columns.ACTION_DIST_INPUTS] = logits
        columns[Columns.ACTION_LOGP] = logps[np.arange(SIZE), columns[Columns.ACTIONS]]
        columns["advantages"], columns["value_targets"] = draw.normal(size=SIZE), draw.normal(size=SIZE)
        columns[Columns.VF_PREDS] = draw.normal(size=SIZE)
    else:
        columns[Columns.NEXT_OBS] = draw.normal(size=(SIZE, 5))
        columns[Columns.TERMINATEDS] = draw.uniform(size=SIZE) < 0.3
        columns["n_step"], columns["weights"] = np.ones(SIZE), np.ones(SIZE)
    cast = {key: value.astype(np.float32) if value.dtype == np.float64 else value for key, value in columns.items()}
    return MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(cast)}, env_steps=SIZE)


def weights(learner: Any) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in learner.module[DEFAULT_MODULE_ID].state_dict().items()}


def update(learner: Any, name: str, seed: int) -> None:
    learner.update(batch=batch(name, seed), timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: 10_000 * (seed + 1)})


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *[("ppo", stage) for stage in (0, 1, 2)],
        *[pytest.param(name, stage, marks=[pytest.mark.long] if stage else []) for name in ("dqn", "ddpg") for stage in (0, 1, 2)],
    ],
)
def test_an_update_on_deepspeed_equals_rllibs(name: str, stage: int) -> None:
    # DDPG's two optimisers are clipped apart by RLlib and together by DeepSpeed.
    clip = {"grad_clip": None} if name == "ddpg" else {}
    plain = build(configuration(name, **clip), name)
    made = configuration(name, **clip, learner_config_dict={"zero_stage": stage})
    engine = build(made.learners(learner_class=with_deepspeed(made.get_default_learner_class())), name)
    engine.module[DEFAULT_MODULE_ID].load_state_dict(plain.module[DEFAULT_MODULE_ID].state_dict())
    before = weights(plain)
    for seed in range(3):
        update(plain, name, seed)
        update(engine, name, seed)
    after, on_deepspeed = weights(plain), weights(engine)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    for key, value in after.items():
        assert torch.allclose(value, on_deepspeed[key], atol=1e-5), key


def test_deepspeeds_state_goes_on_where_it_was() -> None:
    made = configuration("ppo", use_kl_loss=False)  # its coefficient is RLlib's own state
    made.learners(learner_class=with_deepspeed(made.get_default_learner_class()))
    first, second = build(made, "ppo"), build(made, "ppo")
    update(first, "ppo", 0)
    second.module[DEFAULT_MODULE_ID].load_state_dict(first.module[DEFAULT_MODULE_ID].state_dict())
    second._set_optimizer_state(first._get_optimizer_state())
    for learner in (first, second):
        update(learner, "ppo", 1)
    assert all(torch.equal(value, weights(second)[key]) for key, value in weights(first).items())


def test_a_clip_that_deepspeed_lacks_is_refused() -> None:
    made = configuration("ppo", grad_clip_by="value")
    with pytest.raises(ConfigError, match="set grad_clip_by=global_norm"):
        build(made.learners(learner_class=with_deepspeed(made.get_default_learner_class())), "ppo")


def test_clipping_several_optimisers_together_is_refused() -> None:
    made = configuration("ddpg")
    with pytest.raises(ConfigError, match="set grad_clip=null"):
        build(made.learners(learner_class=with_deepspeed(made.get_default_learner_class())), "ddpg")


def test_gradients_of_several_ranks_are_averaged_once() -> None:
    made = configuration("ppo").learners(num_learners=2)
    made.learners(learner_class=with_deepspeed(made.get_default_learner_class()))
    learner = made.learner_class.__new__(made.learner_class)
    learner.config, learner._module = made, nn.Linear(1, 1)
    learner._make_modules_ddp_if_necessary()
    assert type(learner._module) is nn.Linear, "the engine averages; DDP would do so too"


def linear(layer: nn.Linear, weight: list[list[float]], bias: float = 0.0) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.fill_(bias)


def test_deterministic_actor_loss_by_hand() -> None:
    made = configuration("ddpg", hidden=(), twin_q=True, gamma=0.5, grad_clip=None)
    learner = made.build_learner(spaces={DEFAULT_MODULE_ID: (spaces.Box(-9, 9, (1,), np.float32), spaces.Box(-1, 1, (1,), np.float32))})
    learner.build()
    module: DDPGModule = learner.module[DEFAULT_MODULE_ID]
    linear(module.actor[0], [[1.0]])  # mu(s) = tanh(s)
    linear(module.q[0], [[1.0, 2.0]])  # Q = s + 2 a
    assert module.q_twin is not None
    linear(module.q_twin[0], [[0.0, 1.0]])  # its twin: a
    module.make_target_networks()
    data = {
        Columns.OBS: torch.tensor([[0.5], [0.5]]),
        Columns.NEXT_OBS: torch.tensor([[1.0], [1.0]]),
        Columns.ACTIONS: torch.tensor([[0.1], [0.1]]),
        Columns.REWARDS: torch.tensor([3.0, 3.0]),
        Columns.TERMINATEDS: torch.tensor([False, True]),
        "n_step": torch.tensor([1.0, 1.0]),
        "weights": torch.tensor([1.0, 1.0]),
    }
    out = module.forward_train(data)
    later = float(np.tanh(1.0))  # the lower of 1 + 2 tanh(1) and tanh(1)
    assert out["target"].tolist() == pytest.approx([later, later])
    loss = learner.compute_loss_for_module(module_id=DEFAULT_MODULE_ID, config=made, batch=data, fwd_out=out)
    targets = [3 + 0.5 * later, 3.0]
    critics = sum(((q - target) ** 2) / 2 for target in targets for q in (0.5 + 0.2, 0.1))
    actor = -(0.5 + 2 * np.tanh(0.5))
    assert float(loss) == pytest.approx(critics + actor, rel=1e-5)
    loss.backward()
    slope = 1 - np.tanh(0.5) ** 2
    assert float(module.actor[0].weight.grad) == pytest.approx(-2 * slope * 0.5, rel=1e-4), "-dQ/da dmu/dw, the critic's mean slope 2"
    assert float(module.q[0].weight.grad[0, 0]) == pytest.approx(sum(2 * (0.7 - t) * 0.5 / 2 for t in targets), rel=1e-4)


def test_exploration_is_uniform_first_and_noisy_then() -> None:
    made = configuration("ddpg", random_steps=100, noise=0.1)
    module = made.get_default_rl_module_spec()
    module.observation_space, module.action_space, module.model_config = OBSERVATIONS, ACTIONS["ddpg"], made.model_config
    actor = module.build()
    seen = {Columns.OBS: torch.zeros(4000, 5)}
    torch.manual_seed(0)
    greedy = actor.forward_inference(seen)[Columns.ACTIONS]
    early = actor.forward_exploration(seen, t=0)[Columns.ACTIONS]
    late = actor.forward_exploration(seen, t=100)[Columns.ACTIONS]
    assert float(early.std()) == pytest.approx(1 / 3**0.5, rel=0.05)
    assert float((late - greedy).std()) == pytest.approx(0.1, rel=0.1)
    assert float(late.abs().max()) <= 1
