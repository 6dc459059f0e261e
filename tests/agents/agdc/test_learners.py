"""The deterministic-actor learner by hand, and learners on DeepSpeed against RLlib's own, one update on the same batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.dqn.dqn import DQNConfig
from ray.rllib.algorithms.ppo.ppo import PPOConfig
from ray.rllib.algorithms.sac.sac import SACConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME
from torch import nn

from reasoner_ray.agents.agdc.ddpg import DDPGConfig, DDPGLearner, DDPGModule
from reasoner_ray.agents.agdc.deepspeed_learner import with_deepspeed
from reasoner_ray.errors import CheckpointError, ConfigError
from reasoner_ray.learner.engine import start_process_group

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (5,), np.float32)
TWO = spaces.Box(-1, 1, (2,), np.float32)
ACTIONS = {"ppo": spaces.Discrete(4), "dqn": spaces.Discrete(4), "ddpg": TWO, "sac": TWO}
SIZE = 24


def configuration(name: str, **settings: Any) -> Any:
    made = {"ppo": PPOConfig, "dqn": DQNConfig, "ddpg": DDPGConfig, "sac": SACConfig}[name]()
    made.framework("torch").debugging(seed=3)
    if name != "ddpg":
        made.rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[16]))
    own: dict[str, dict[str, Any]] = {
        "ppo": {"num_epochs": 1, "lr": 1e-2},
        "dqn": {"num_atoms": 1, "lr": 1e-2},
        "ddpg": {"hidden": (16,), "lr": 1e-2},
        "sac": {"actor_lr": 1e-2, "critic_lr": 1e-2, "alpha_lr": 1e-2, "lr": None},
    }
    return made.training(**{"grad_clip": 0.5, "grad_clip_by": "global_norm", **own[name], **settings})


def on_deepspeed(name: str, stage: int, **settings: Any) -> Any:
    made = configuration(name, **settings, learner_config_dict={"zero_stage": stage})
    return made.learners(learner_class=with_deepspeed(made.get_default_learner_class()))


def build(made: Any, name: str) -> Any:
    """A learner that stands alone."""
    learner = made.build_learner(spaces={DEFAULT_MODULE_ID: (OBSERVATIONS, ACTIONS[name])})
    learner.build()
    return learner


def batch(name: str, seed: int = 0) -> MultiAgentBatch:
    draw = np.random.default_rng(seed)
    columns: dict[str, Any] = {Columns.OBS: draw.normal(size=(SIZE, 5)), Columns.REWARDS: draw.normal(size=SIZE)}
    columns[Columns.ACTIONS] = draw.uniform(-1, 1, size=(SIZE, 2)) if name in ("ddpg", "sac") else draw.integers(4, size=SIZE)
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
    torch.manual_seed(seed)  # DDPG and SAC draw noise
    learner.update(batch=batch(name, seed), timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: 10_000 * (seed + 1)})


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *[(name, 0) for name in ("ppo", "dqn", "ddpg", "sac")],
        ("ddpg", 2),
        *[pytest.param(name, 1, marks=pytest.mark.long) for name in ("ppo", "dqn", "ddpg", "sac")],
        *[pytest.param(name, 2, marks=pytest.mark.long) for name in ("ppo", "dqn", "sac")],
    ],
)
def test_an_update_on_deepspeed_equals_rllibs(name: str, stage: int) -> None:
    plain, engine = build(configuration(name), name), build(on_deepspeed(name, stage), name)
    assert len(plain._named_optimizers) == {"ddpg": 2, "sac": 4}.get(name, 1)
    draw = torch.Generator().manual_seed(5)
    start = {key: value + 0.1 * torch.randn(value.shape, generator=draw) for key, value in weights(plain).items()}
    for learner in (plain, engine):  # weights that were not there when the engine was built
        learner.module[DEFAULT_MODULE_ID].load_state_dict(start)
    for seed in range(3):
        update(plain, name, seed)
        update(engine, name, seed)
    after, with_engine = weights(plain), weights(engine)
    assert any(not torch.equal(start[key], after[key]) for key in start)
    for key, value in after.items():
        assert torch.allclose(value, with_engine[key], atol=1e-5), key
    untouched = build(configuration(name, grad_clip=None), name)
    untouched.module[DEFAULT_MODULE_ID].load_state_dict(start)
    for seed in range(3):
        update(untouched, name, seed)
    free = weights(untouched)
    assert any(not torch.allclose(free[key], value, atol=1e-5) for key, value in after.items()), "the clip cuts in"


@pytest.mark.parametrize("stage", [0, 2])
def test_each_way_to_clip_is_rllibs(stage: int) -> None:
    for by in ("value", "norm"):
        clip = {"grad_clip": 0.01, "grad_clip_by": by}
        plain, engine = build(configuration("ddpg", **clip), "ddpg"), build(on_deepspeed("ddpg", stage, **clip), "ddpg")
        for learner in (plain, engine):
            update(learner, "ddpg", 0)
            update(learner, "ddpg", 1)
        assert all(torch.allclose(value, weights(engine)[key], atol=1e-5) for key, value in weights(plain).items()), by


@pytest.mark.parametrize(("name", "stage"), [("ppo", 0), ("ddpg", 0), ("ddpg", 2)])
def test_deepspeeds_state_goes_on_where_it_was(name: str, stage: int, tmp_path: Path) -> None:
    made = on_deepspeed(name, stage, **({"use_kl_loss": False} if name == "ppo" else {}))  # its coefficient is RLlib's own state
    first, second = build(made, name), build(made, name)
    update(first, name, 0)
    first.save_to_path(tmp_path / "kept")
    second.restore_from_path(tmp_path / "kept")
    for learner in (first, second):
        update(learner, name, 1)
    assert all(torch.equal(value, weights(second)[key]) for key, value in weights(first).items())


class TwoKinds(DDPGLearner):
    """Its actor is taught by SGD."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        module = self._module[module_id].unwrapped()
        for name, part, kind in (("critic", module.q, torch.optim.Adam), ("actor", module.actor, torch.optim.SGD)):
            own = list(part.parameters())
            self.register_optimizer(
                module_id=module_id, optimizer_name=name, optimizer=kind(own, lr=0.1), params=own, lr_or_lr_schedule=0.1
            )


def test_optimisers_of_several_kinds_are_refused() -> None:
    made = configuration("ddpg", twin_q=False)
    with pytest.raises(ConfigError, match=r"optimisers of one kind, not \['Adam', 'SGD'\]"):
        build(made.learners(learner_class=with_deepspeed(TwoKinds)), "ddpg")


def _learn_beside_another(rank: int, stage: int, folder: Path) -> None:
    """One of two learners, each with its half of the batch."""
    start_process_group(rank, 2, torch.distributed.FileStore(str(folder / "meet"), 2), 60)
    made = on_deepspeed("ddpg", stage, target_noise=0.0).learners(num_learners=2)
    learner = build(made, "ddpg")
    for seed in range(3):
        whole = batch("ddpg", seed)[DEFAULT_MODULE_ID]
        half = MultiAgentBatch({DEFAULT_MODULE_ID: whole[rank * SIZE // 2 : (rank + 1) * SIZE // 2]}, env_steps=SIZE // 2)
        learner.update(batch=half, timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: 10_000 * (seed + 1)})
    torch.save(weights(learner), folder / f"rank{rank}.pt")


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_learn_what_one_does(stage: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_learn_beside_another, args=(stage, tmp_path), nprocs=2)
    plain = build(configuration("ddpg", target_noise=0.0), "ddpg")
    for seed in range(3):
        update(plain, "ddpg", seed)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert all(torch.allclose(value, found[key], atol=1e-5) for key, value in weights(plain).items())


def _stop_and_go_on(rank: int, stage: int, folder: Path) -> None:
    """One of two learners, whose first saves and whose successors go on from there."""
    start_process_group(rank, 2, torch.distributed.FileStore(str(folder / "meet"), 2), 60)
    made = on_deepspeed("ddpg", stage, target_noise=0.0).learners(num_learners=2)
    first, second = build(made, "ddpg"), build(made, "ddpg")
    update(first, "ddpg", 0)
    update(first, "ddpg", 1)
    if stage and rank == 0:
        with pytest.raises(CheckpointError, match="lies on 2 learners; call .*gather_optimizers"):
            first.save_to_path(folder / "torn")
    first.gather_optimizer()
    if rank == 0:
        first.save_to_path(folder / "kept")
    torch.distributed.barrier()
    second.restore_from_path(folder / "kept")
    for learner in (first, second):
        update(learner, "ddpg", 2)
    torch.save((weights(first), weights(second)), folder / f"rank{rank}.pt")


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_go_on_where_they_were(stage: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_stop_and_go_on, args=(stage, tmp_path), nprocs=2)
    for rank in range(2):
        straight, resumed = torch.load(tmp_path / f"rank{rank}.pt")
        assert all(torch.equal(value, resumed[key]) for key, value in straight.items())
    if stage:
        alone = build(on_deepspeed("ddpg", stage), "ddpg")
        with pytest.raises(CheckpointError, match=r"split over 2 learners, not 1; resume with num_learners \(learner\.ranks\) 2"):
            alone.restore_from_path(tmp_path / "kept")


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
    made = configuration("ddpg", hidden=(), twin_q=True, gamma=0.5, target_noise=0.0)
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
