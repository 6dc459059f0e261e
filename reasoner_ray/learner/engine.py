"""DeepSpeed, and nothing else of the learner: process group, engine, one optimiser step.

Trained parameters, gradients and optimiser state are float32 at every ZeRO stage (the policy runs its passes under
autocast where the compute type is bfloat16). So one rule holds everywhere: a non-finite gradient norm leaves the
weights alone, and a checkpoint loses no bit.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from reasoner_ray.errors import EnvironmentProblem
from reasoner_ray.learner.model import Outputs, PolicyModel
from reasoner_ray.settings import set_learner_environment

if TYPE_CHECKING:
    from reasoner_ray.learner.settings import LearnerConfig
    from reasoner_ray.packing import Batch

REDUCE_BUCKET = 50_000_000
"""Gradient elements ZeRO reduces at once; DeepSpeed allocates a buffer of this size (its default takes 2 GB)."""


STILL = (1 - 1e-12, 1 - 1e-12)
"""Adam's betas under which moments stay as they are in float32 (at 1 its bias correction would be 0 / 0)."""


def open_store(host: str, world_size: int, timeout_s: float, port: int = 0) -> dist.TCPStore:
    """The meeting point of a process group, listening on ``port`` of this machine (0: a free one); its ``port`` is where others join.

    Raises ``EnvironmentProblem`` where the port is taken, or ``host`` is no address of this machine.
    """
    try:
        return dist.TCPStore(host, port, world_size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    except dist.DistError as error:
        raise EnvironmentProblem(
            f"learner rank 0 cannot open a meeting point at {host}:{port or 'any port'}: {error}. Free a port, or start Ray with the "
            "--node-ip-address that the nodes reach each other by"
        ) from error


def join_store(host: str, port: int, world_size: int, timeout_s: float) -> dist.TCPStore:
    """Connect to a store that another process opened. Raises ``EnvironmentProblem`` where it does not answer."""
    try:
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=timedelta(seconds=timeout_s))
    except dist.DistError as error:
        raise EnvironmentProblem(f"cannot reach learner rank 0 at {host}:{port}: {error}") from error


def start_process_group(rank: int, world_size: int, store: dist.Store | None, timeout_s: float) -> None:
    """Join the learners' process group, or go on with the one this process is in already.

    A single rank needs no ``store``. Raises ``EnvironmentProblem`` where the other ranks do not turn up in time.
    """
    cuda = torch.cuda.is_available()
    set_learner_environment(rank, 0, world_size, cuda=cuda)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
            raise ValueError(f"this process is rank {dist.get_rank()} of {dist.get_world_size()} already, not {rank} of {world_size}")
        return
    if store is None and world_size > 1:
        raise ValueError("from two ranks on, a store is needed to meet at")
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store or dist.HashStore(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        raise EnvironmentProblem(f"learner rank {rank} of {world_size}: the other ranks did not join in time: {error}") from error


def _bound_collectives(timeout_s: float) -> None:
    """Give every process group the learner's deadline; DeepSpeed makes groups of its own with PyTorch's default of 30 minutes."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def import_deepspeed() -> Any:
    """DeepSpeed, without its shared-memory all-reduce: that compiles C++ for a minute at the first use, and gloo is fast enough."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)  # DeepSpeed's own calls
    return deepspeed


def deepspeed_settings(stage: int, max_norm: float | None) -> dict[str, Any]:
    """What DeepSpeed is started with: one micro-batch an update, ZeRO ``stage``, gradients clipped to ``max_norm`` (None: not)."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": REDUCE_BUCKET,
            "allgather_bucket_size": REDUCE_BUCKET,
        },
    }


class _Calls(nn.Module):
    """Every use of the policy behind one ``forward``, which is what ZeRO's hooks surround."""

    def __init__(self, policy: PolicyModel) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch, reference: bool, **wants: bool) -> Outputs | tuple[torch.Tensor]:
        if reference:
            return (self.policy.reference_logprobs(batch),)
        return self.policy(batch, **wants)


class GradientEngine:
    """A module under DeepSpeed whose gradient is the plain sum of its micro-batches' gradients over all ranks.

    Denominators are in the losses already, so DeepSpeed's own averages (over ranks and accumulation steps) are undone.
    """

    def __init__(
        self, module: nn.Module, changing: Callable[[], dict[str, nn.Parameter]], groups: list[dict[str, Any]], config: LearnerConfig
    ) -> None:
        """``changing`` gives the parameters that training changes, by name; ``groups`` are the optimiser's, each with its ``lr``."""
        self._changing = changing
        self.stage = config.zero_stage
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        self._max_norm = config.max_grad_norm
        self._betas = config.betas
        groups = [g for g in groups if g["params"]]
        self._base_lrs = [float(g["lr"]) for g in groups]
        self._trained = [p for g in groups for p in g["params"]]
        optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True)
        self._engine, *_ = import_deepspeed().initialize(
            model=module, optimizer=optimizer, config=self._deepspeed_config(), dist_init_required=False
        )
        if self.world_size == 1 and self.stage == 0:
            self._engine.enable_backward_allreduce = False  # there is nobody to reduce with, and the copies cost seconds on CPU
        _bound_collectives(config.collective_timeout_s)

    def _deepspeed_config(self) -> dict[str, Any]:
        # At stage 0 `step` clips, to see the norm first.
        return deepspeed_settings(self.stage, self._max_norm if self.stage > 0 else None)

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return torch.device(self._engine.device)

    # -- forward, backward, step ---------------------------------------------------------------------------

    def call(self, *args: Any, **options: Any) -> Any:
        """The module on these arguments, with a graph unless gradients are off."""
        self._engine.train(torch.is_grad_enabled())
        return self._engine(*args, **options)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss`` (scalar, divided by global denominators); ``last`` of an update also reduces over ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world_size)

    def step(self, lr_scale: float, held: Collection[str] = ()) -> float:
        """Clip and apply the gradient with every learning rate times ``lr_scale``; returns the norm before clipping.

        The groups named in ``held`` keep their weights, and their moments but for the count of steps. Where the returned norm is not
        finite, nothing was applied; all ranks agree on it.
        """
        for group, lr in zip(self._engine.optimizer.param_groups, self._base_lrs, strict=True):
            still = group.get("name") in held
            group["lr"] = 0.0 if still else lr * lr_scale
            group["betas"] = STILL if still else self._betas
        norm = math.nan
        if self.stage == 0:
            norm = float(nn.utils.clip_grad_norm_(self._trained, self._max_norm))
            if not math.isfinite(norm):
                self.discard()
                return norm
        self._engine.step()
        if self.stage > 0:
            norm = math.inf if self._engine.optimizer.overflow else float(self._engine.get_global_grad_norm())
        return norm

    def discard(self) -> None:
        """Drop the gradients gathered so far."""
        self._engine.optimizer.zero_grad()

    # -- talk between ranks --------------------------------------------------------------------------------

    def reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> list[float]:
        """``values`` reduced over ranks in float64; every rank gives equally many."""
        if self.world_size == 1:
            return [float(v) for v in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """A context in which ``parameters`` are whole on every rank (ZeRO 3 keeps them in parts). All ranks must enter it."""
        if self.stage < 3:
            return nullcontext()
        return import_deepspeed().zero.GatheredParameters(list(parameters))

    # -- state ---------------------------------------------------------------------------------------------

    def changing_shapes(self) -> dict[str, list[int]]:
        """Name and full shape of every parameter that training changes."""
        return {n: list(getattr(p, "ds_shape", p.shape)) for n, p in self._changing().items()}

    def state_dict(self) -> dict[str, Any]:
        """This rank's share of the training state: optimiser, and weights where it is the one to keep them."""
        optimizer = self._engine.optimizer
        if self.stage == 3:
            optimizer.checkpoint_event_prologue()
        state: dict[str, Any] = {"optimizer": optimizer.state_dict() if self.stage > 0 or self.rank == 0 else None}
        if self.stage < 3 and self.rank == 0:
            state["weights"] = {n: p.detach() for n, p in self._changing().items()}
        if self.stage == 3:
            optimizer.checkpoint_event_epilogue()
        return state

    def load_state_dict(self, own: dict[str, Any], first: dict[str, Any]) -> None:
        """Restore from this rank's state and rank 0's (which holds the weights below ZeRO 3)."""
        optimizer = self._engine.optimizer
        if self.stage < 3:
            parameters = self._changing()
            with torch.no_grad():
                for name, value in first["weights"].items():
                    parameters[name].copy_(value)
        if self.stage == 0:
            optimizer.load_state_dict(first["optimizer"])
            return
        if self.stage == 3:
            optimizer.checkpoint_event_prologue()
        optimizer.load_state_dict([own["optimizer"]] * self.world_size, load_from_fp32_weights=True)
        if self.stage == 3:
            optimizer.checkpoint_event_epilogue()


class UpdateEngine(GradientEngine):
    """The engine of a language model with its critics."""

    def __init__(self, policy: PolicyModel, groups: list[dict[str, Any]], config: LearnerConfig) -> None:
        self.policy = policy
        super().__init__(_Calls(policy), policy.changing_parameters, groups, config)

    def forward(self, batch: Batch, *, want_values: bool, want_entropy: bool, want_q: bool, want_target: bool) -> Outputs:
        """The policy on a batch, with a graph unless gradients are off. Every rank must call it equally often (ZeRO 3)."""
        outputs: Outputs = self.call(
            batch, False, want_values=want_values, want_entropy=want_entropy, want_q=want_q, want_target=want_target
        )
        return outputs

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> torch.Tensor:
        """log pi_ref of the batch's targets, float32 [K]."""
        (logprobs,) = self._engine(batch, True)
        return logprobs
