"""RLlib's learners on DeepSpeed: the same losses and hooks, with the optimiser stepped by a DeepSpeed engine (ZeRO 0 to 2).

config.learners(learner_class=with_deepspeed(PPOTorchLearner)).training(learner_config_dict={"zero_stage": 1})
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.utils.numpy import convert_to_numpy
from ray.rllib.utils.torch_utils import convert_to_torch_tensor
from torch import nn

from reasoner_ray.errors import ConfigError
from reasoner_ray.learner.engine import deepspeed_settings, import_deepspeed, start_process_group

TIMEOUT_S = 600.0
ENGINE = "deepspeed"


class _Forward(nn.Module):
    """The modules of a learner behind one ``forward``, which is what ZeRO's hooks surround."""

    def __init__(self, whole: Any, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self._whole = [whole]  # in a list: its parameters are those of the parts

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self._whole[0].forward_train(batch)


class DeepSpeedSteps:
    """Goes before a Torch learner among the bases of a class (``with_deepspeed`` makes one).

    One optimiser holds every parameter group that the learner registered, with its own learning rate. ``learner_config_dict`` has
    ``zero_stage`` (0 to 2) and ``timeout_s``. Gradients are clipped by their norm (``grad_clip``), which several optimisers
    cannot have: RLlib clips each one's apart.
    """

    def build(self) -> None:
        """Build the learner, then the engine round its modules and optimisers. Raises ``ConfigError``."""
        super().build()  # type: ignore[misc]
        learner: Any = self
        config = learner.config
        if config.grad_clip is not None and config.grad_clip_by != "global_norm":
            raise ConfigError(f"grad_clip_by={config.grad_clip_by!r}: DeepSpeed clips by the global norm; set grad_clip_by=global_norm")
        if config.grad_clip is not None and len(learner._named_optimizers) > 1:
            raise ConfigError(
                f"grad_clip={config.grad_clip:g}: RLlib clips the gradients of {len(learner._named_optimizers)} optimisers apart, "
                "DeepSpeed all together; set grad_clip=null (agdc.settings.grad_clip)"
            )
        options = config.learner_config_dict
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)  # RLlib has several learners meet
        start_process_group(rank, size, None, options.get("timeout_s", TIMEOUT_S))
        groups = [dict(group) for optimizer in learner._named_optimizers.values() for group in optimizer.param_groups]
        parts = {name: module for name, module in learner.module._rl_modules.items() if isinstance(module, nn.Module)}
        self._engine, *_ = import_deepspeed().initialize(
            model=_Forward(learner.module, parts),
            optimizer=torch.optim.Adam(groups),
            config=deepspeed_settings(int(options.get("zero_stage", 0)), config.grad_clip),
            dist_init_required=False,
        )

    def _make_modules_ddp_if_necessary(self) -> None:
        """Leave the modules as they are: the engine averages gradients over ranks, which DDP would do a second time."""

    def _uncompiled_update(self, batch: dict[str, Any], **kwargs: Any) -> tuple[Any, Any, dict[str, Any]]:
        learner: Any = self
        learner._compute_off_policyness(batch)
        out = self._engine(batch)
        losses = learner.compute_losses(fwd_out=out, batch=batch)
        # RLlib schedules the learning rates of the optimisers it knows.
        known = [group for optimizer in learner._named_optimizers.values() for group in optimizer.param_groups]
        for group, source in zip(self._engine.optimizer.param_groups, known, strict=True):
            group["lr"] = source["lr"]
        self._engine.backward(sum(losses.values()))
        self._engine.step()
        return out, losses, {}

    def _get_optimizer_state(self) -> dict[str, Any]:
        return {ENGINE: convert_to_numpy(self._engine.optimizer.state_dict())}

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        learner: Any = self
        found = convert_to_torch_tensor(state[ENGINE], device=learner._device)
        if self._engine.zero_optimization():
            self._engine.optimizer.load_state_dict([found], load_from_fp32_weights=True)
        else:
            groups = state[ENGINE]["param_groups"]  # numbers stay numbers
            self._engine.optimizer.load_state_dict({"state": found["state"], "param_groups": groups})


@functools.cache
def with_deepspeed(learner: type[TorchLearner]) -> type[TorchLearner]:
    """``learner`` with its optimiser stepped by DeepSpeed. Ray ships the class by value, so it need not be importable by name."""
    return type(f"DeepSpeed{learner.__name__}", (DeepSpeedSteps, learner), {})
