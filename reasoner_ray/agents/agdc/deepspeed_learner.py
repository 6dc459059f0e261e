"""RLlib's learners on DeepSpeed: the same losses, gradients and hooks, with the optimisers stepped by a DeepSpeed engine (ZeRO 0 to 2).

config.learners(learner_class=with_deepspeed(PPOTorchLearner)).training(learner_config_dict={"zero_stage": 1})

A learner computes its gradients as it always does: all at once, or a loss for each of its optimisers (SAC). They then go through the
engine, which averages them over the ranks and keeps, at ZeRO 1 and 2, a share of the optimisers' state on each; RLlib's own hooks see
the averages whole and clip them, those of each optimiser apart.

RLlib's checkpoints hold the first learner's state alone. Where several learners share the optimisers' state (ZeRO 1 and 2), it must be
gathered before a checkpoint:

    gather_optimizers(algorithm.learner_group)
    algorithm.save_to_path(folder)
"""

from __future__ import annotations

import functools
import io
from typing import Any

import torch
import torch.distributed as dist
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from torch import nn

from reasoner_ray.errors import CheckpointError, ConfigError
from reasoner_ray.learner.engine import deepspeed_settings, import_deepspeed, start_process_group

TIMEOUT_S = 600.0
ENGINE = "deepspeed"


class _Slots(nn.Module):
    """The parameters of a learner as the engine holds them, apart from its modules: ZeRO's hooks fire at any backward pass."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.slots = nn.ParameterList(nn.Parameter(parameter.detach()) for parameter in parameters)

    def forward(self, gradients: list[torch.Tensor | None]) -> torch.Tensor:
        """A scalar whose gradients are ``gradients``, one for each slot."""
        parts = [(slot * gradient).sum() for slot, gradient in zip(self.slots, gradients, strict=True) if gradient is not None]
        return torch.stack(parts).sum()


class DeepSpeedSteps:
    """Goes before a Torch learner among the bases of a class (``with_deepspeed`` makes one).

    One engine holds every parameter group of every optimiser that the learner registered, each with its own learning rate.
    ``learner_config_dict`` has ``zero_stage`` (0 to 2) and ``timeout_s``.
    """

    def build(self) -> None:
        """Build the learner, then the engine of its optimisers. Raises ``ConfigError`` for optimisers that one engine cannot hold."""
        super().build()  # type: ignore[misc]
        learner: Any = self
        self._shares: list[bytes] | None = None
        kinds = {type(optimizer) for optimizer in learner._named_optimizers.values()}
        if len(kinds) != 1:
            raise ConfigError(f"a DeepSpeed engine holds optimisers of one kind, not {sorted(kind.__name__ for kind in kinds)}")
        if learner._grad_scalers is not None:
            raise ConfigError("DeepSpeed scales no losses here; leave out RLlib's _torch_grad_scaler_class")
        options = learner.config.learner_config_dict
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)  # RLlib has several learners meet
        start_process_group(rank, size, None, options.get("timeout_s", TIMEOUT_S))
        known = [group for optimizer in learner._named_optimizers.values() for group in optimizer.param_groups]
        parameters = [parameter for group in known for parameter in group["params"]]
        self._refs = [learner.get_param_ref(parameter) for parameter in parameters]
        slots = _Slots(parameters)
        unused = iter(slots.slots)
        groups = [{**group, "params": [next(unused) for _ in group["params"]]} for group in known]
        self._engine, *_ = import_deepspeed().initialize(
            model=slots,
            optimizer=kinds.pop()(groups),
            config=deepspeed_settings(int(options.get("zero_stage", 0)), None),
            dist_init_required=False,
        )
        self._slots = list(slots.slots)
        for parameter, slot in zip(parameters, self._slots, strict=True):
            parameter.data = slot.data  # one memory, wherever the engine has laid it

    def _make_modules_ddp_if_necessary(self) -> None:
        """Leave the modules as they are: the engine averages gradients over ranks, which DDP would do a second time."""

    def _uncompiled_update(self, batch: dict[str, Any], **kwargs: Any) -> tuple[Any, Any, dict[str, Any]]:
        learner: Any = self
        learner._compute_off_policyness(batch)
        out = learner.module.forward_train(batch)
        losses = learner.compute_losses(fwd_out=out, batch=batch)
        gradients = learner.compute_gradients(losses)
        learner.apply_gradients(learner.postprocess_gradients(self._averaged(gradients)))
        return out, losses, {}

    def _averaged(self, gradients: dict[Any, torch.Tensor | None]) -> dict[Any, torch.Tensor]:
        """What the engine makes of this rank's ``gradients``: the ranks' means, whole on each."""
        from deepspeed.utils import safe_get_full_grad

        self._engine.backward(self._engine([gradients[ref] for ref in self._refs]))
        return {ref: safe_get_full_grad(slot) for ref, slot in zip(self._refs, self._slots, strict=True) if gradients[ref] is not None}

    def apply_gradients(self, gradients_dict: dict[Any, torch.Tensor]) -> None:
        """Step the engine with whole gradients; those that are not finite become zeros, as in RLlib (``torch_skip_nan_gradients``)."""
        from deepspeed.utils import safe_set_full_grad

        learner: Any = self
        for ref, slot in zip(self._refs, self._slots, strict=True):
            if ref in gradients_dict:
                gradient = gradients_dict[ref]
                safe_set_full_grad(slot, gradient if learner.config.torch_skip_nan_gradients else torch.nan_to_num(gradient))
        # RLlib schedules the learning rates of the optimisers it knows.
        known = [group for optimizer in learner._named_optimizers.values() for group in optimizer.param_groups]
        for group, source in zip(self._engine.optimizer.param_groups, known, strict=True):
            group["lr"] = source["lr"]
        if self._engine.zero_optimization():
            self._engine.optimizer.refresh_fp32_params()  # weights may have been set since the last step
        self._shares = None
        self._engine.step()

    @property
    def _ranks(self) -> int:
        """That share the optimisers' state."""
        return dist.get_world_size() if self._engine.zero_optimization() else 1

    def gather_optimizer(self) -> None:
        """Bring every rank's share of the optimisers' state to the first rank, until the next step. All ranks must call it."""
        if self._ranks == 1:
            return
        shares: list[Any] | None = [None] * self._ranks if dist.get_rank() == 0 else None
        dist.gather_object(self._own_share(), shares, dst=0)
        self._shares = shares

    def _own_share(self) -> bytes:
        kept = io.BytesIO()  # it holds more than the tensors and numbers that RLlib converts
        torch.save(self._engine.optimizer.state_dict(), kept)
        return kept.getvalue()

    def _get_optimizer_state(self) -> dict[str, Any]:
        if self._ranks == 1:
            return {ENGINE: [self._own_share()]}
        if self._shares is None:
            raise CheckpointError(
                f"the optimisers' state lies on {self._ranks} learners; call reasoner_ray.agents.agdc.deepspeed_learner.gather_optimizers("
                "algorithm.learner_group) before saving"
            )
        return {ENGINE: self._shares}

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        learner: Any = self
        shares, own = state[ENGINE], dist.get_rank() if self._ranks > 1 else 0
        if len(shares) != self._ranks:
            raise CheckpointError(
                f"the checkpoint's optimisers are split over {len(shares)} learners, not {self._ranks}; resume with num_learners "
                f"(learner.ranks) {len(shares)} and the same zero_stage"
            )
        found = torch.load(io.BytesIO(shares[own]), map_location=learner._device, weights_only=False)
        if self._engine.zero_optimization():
            self._engine.optimizer.load_state_dict([found] * self._ranks, load_from_fp32_weights=True)
        else:
            self._engine.optimizer.load_state_dict(found)


def gather_optimizers(group: LearnerGroup) -> None:
    """Make the optimisers' state of a group of DeepSpeed learners whole on the first, so that a checkpoint holds it.

    Raises what a learner raised.
    """
    for result in group.foreach_learner(lambda learner: learner.gather_optimizer()):
        if not result.ok:
            raise result.get()


@functools.cache
def with_deepspeed(learner: type[TorchLearner]) -> type[TorchLearner]:
    """``learner`` with its optimisers stepped by DeepSpeed. Ray ships the class by value, so it need not be importable by name."""
    return type(f"DeepSpeed{learner.__name__}", (DeepSpeedSteps, learner), {})
