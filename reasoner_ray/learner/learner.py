"""The learner of one rank: trajectories in, an updated policy and its metrics out.

It is blind to the algorithm: it computes what the algorithm asks for (values, log-probs of the reference, of the
policy before the update), hands flat streams to its ``credit`` and packed micro-batches to its ``loss``.

Where a step is one update over each trajectory once, a micro-batch's own detached outputs are the old log-probs and
values, and it is computed once (*single pass*). That holds if the step is one micro-batch, or if credit needs no more
of the forward pass than a trajectory's own values, as GAE does (an algorithm whose credit mixes the values of a group
says ``needs_group``). Otherwise a first pass without gradients computes them for the whole step.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist

from reasoner_ray.algorithms.supervised import objective_of
from reasoner_ray.credit import Credit, kl_estimate, mean_std, whiten
from reasoner_ray.errors import NonFiniteError
from reasoner_ray.learner.checkpoint import load_state, save_state
from reasoner_ray.learner.engine import UpdateEngine, start_process_group
from reasoner_ray.learner.heads import HeadInfo, save_head
from reasoner_ray.learner.model import Outputs, load_policy, policy_state, save_policy
from reasoner_ray.learner.schedule import rate_scale
from reasoner_ray.losses import Denominators, gather_inputs, summarise, trainable_weights
from reasoner_ray.models import load_tokenizer, resolve_dtype, resolve_model
from reasoner_ray.packing import Batch, pack
from reasoner_ray.trajectory import TokenStreams, Trajectory, flatten

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


@dataclass(frozen=True, slots=True)
class _Micro:
    """A packed micro-batch and where its tokens and trajectories lie in the step."""

    batch: Batch
    tokens: torch.Tensor  # int64 [K]; index into the step's streams
    bootstrap: torch.Tensor  # int64 [b]; trajectories whose state after the last token is valued


@dataclass
class _Step:
    """One training step on one rank: its streams, filled as forward passes go, and its updates' micro-batches."""

    trajectories: list[Trajectory]
    streams: TokenStreams
    weights: torch.Tensor  # float32 [K]; 0 drops a token
    updates: list[list[_Micro]]
    single_pass: bool
    credit: Credit | None = None


class Learner:
    """A policy (and critic) that learns. Every rank calls the same methods in the same order."""

    def __init__(self, config: JobConfig, rank: int = 0, world_size: int = 1, store: dist.Store | None = None) -> None:
        """``store`` is where the ranks meet, needed from two on. Raises ``ModelError``, ``EnvironmentProblem``."""
        self.config = config
        self.algorithm, self.settings = objective_of(config)
        if config.learner.torch_threads is not None:
            torch.set_num_threads(config.learner.torch_threads)
        start_process_group(rank, world_size, store, config.learner.collective_timeout_s)
        torch.manual_seed(config.seed)  # a critic's first weights; every rank draws the same
        self.compute_dtype = resolve_dtype(config.model.dtype)
        self._wants_reference = self.algorithm.wants_reference(self.settings)
        policy = load_policy(
            config.model,
            config.learner,
            needs_reference=self._wants_reference,
            temperature=config.rollout.temperature,
            device="cuda" if torch.cuda.is_available() else "cpu",
            head_kind=config.kind if config.kind in ("prm", "value") else None,
        )
        groups = [
            {"name": "policy", "params": policy.policy_parameters(), "lr": config.learner.lr},
            {"name": "critic", "params": policy.critic_parameters(), "lr": config.learner.critic_lr},
        ]
        self.engine = UpdateEngine(policy, groups, config.learner)
        self._updates_done = 0
        self._wants_values = self.algorithm.needs_critic
        self._wants_soft = self.algorithm.needs_soft_critic
        self._credit_reads_forward = self._wants_values or self._wants_soft or self.algorithm.wants_old_logprobs(self.settings)

    # -- training ------------------------------------------------------------------------------------------

    def train_step(self, groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
        """Learn from this rank's share of a step's groups; returns metrics of the whole step, the same on all ranks.

        Raises ``NonFiniteError`` (on all ranks, weights unchanged) where a loss or gradient is not finite; gradients may
        linger, so the learner can then be looked at, saved or loaded into, but not trained further.
        """
        started = time.perf_counter()
        step = self._prepare(groups)
        passes = [self._update(step, micros) for _ in range(self.config.learner.epochs) for micros in step.updates]
        # A metric may be missing from a pass: the explained variance is, where returns do not vary.
        shown = {key: [p[key] for p in passes if key in p] for key in dict.fromkeys(chain.from_iterable(passes))}
        metrics = {key: sum(values) / len(values) for key, values in shown.items()}
        return metrics | self._mismatch(step) | self._throughput(step, time.perf_counter() - started)

    def _prepare(self, groups: Sequence[Sequence[Trajectory]]) -> _Step:
        """Flatten and pack; in two-pass mode also run the first forward pass; credit where it can be known already."""
        trainable = [[t for t in group if t.status.is_trainable] for group in groups]
        trajectories = [t for group in trainable for t in group]
        streams = flatten(trajectories)
        if self._wants_values:
            streams.values, streams.bootstrap = torch.zeros(streams.n_tokens), torch.zeros(streams.n_trajectories)
        if self._wants_reference:
            streams.ref_logprobs = torch.zeros(streams.n_tokens)
        if self._wants_soft:
            streams.target_q, streams.kl = torch.zeros(streams.n_tokens), torch.zeros(streams.n_tokens)
        streams.old_logprobs = torch.zeros(streams.n_tokens)
        updates = self._pack_updates(trainable)
        step = _Step(trajectories, streams, trainable_weights(streams), updates, self._fits_single_pass(updates, trajectories))
        if not step.single_pass:
            with torch.no_grad():
                for micro in (m for micros in step.updates for m in micros):
                    self._record(step, micro, self._forward(micro, records=True, trains=False))
        if not (step.single_pass and self._credit_reads_forward):
            step.credit = self._credit(step)
        return step

    def _fits_single_pass(self, updates: list[list[_Micro]], trajectories: list[Trajectory]) -> bool:
        if len(updates) > 1 or self.config.learner.epochs > 1:
            return False
        spread = any(len(t.context_starts) > 1 for t in trajectories)  # its contexts may lie in several micro-batches
        mixes = self.settings.normalize_advantages or self.algorithm.needs_group or spread
        return len(updates[0]) == 1 or not (mixes and self._credit_reads_forward)

    def _pack_updates(self, groups: list[list[Trajectory]]) -> list[list[_Micro]]:
        """Cut the groups into updates and each update into micro-batches, as many on every rank."""
        learner = self.config.learner
        if len(groups) % learner.updates_per_step:
            raise ValueError(f"{len(groups)} groups do not divide into {learner.updates_per_step} updates")
        share, updates, token, number = len(groups) // learner.updates_per_step, [], 0, 0
        for u in range(learner.updates_per_step):
            part = [t for group in groups[u * share : (u + 1) * share] for t in group]
            batches = pack(
                part,
                tokens_per_microbatch=learner.tokens_per_microbatch,
                share_prefixes=learner.share_prefixes,
                bootstrap=self.algorithm.wants_bootstrap(self.settings),
            )
            (most,) = self.engine.reduce([len(batches)], dist.ReduceOp.MAX)
            if not most:
                raise ValueError(f"update {u} of the step holds no token to train on")
            batches += [Batch.empty()] * (int(most) - len(batches))
            updates.append([_Micro(b, b.stream_index + token, b.bootstrap_trajectory + number) for b in batches])
            token += sum(t.trainable_tokens for t in part)
            number += len(part)
        return updates

    def _forward(self, micro: _Micro, *, records: bool, trains: bool) -> Outputs:
        """A pass that is recorded in the streams, one that makes a gradient, or both."""
        return self.engine.forward(
            micro.batch,
            want_values=self._wants_values,
            want_entropy=trains and self.algorithm.wants_entropy,
            want_q=self._wants_soft and trains,
            want_target=self._wants_soft and records,
        )

    def _record(self, step: _Step, micro: _Micro, out: Outputs) -> None:
        """Write what the policy and critic say before the update into the streams."""
        streams = step.streams
        assert streams.old_logprobs is not None
        streams.old_logprobs[micro.tokens] = out.logprobs.detach().float().cpu()
        if streams.values is not None and streams.bootstrap is not None:
            assert out.values is not None and out.bootstrap_values is not None
            streams.values[micro.tokens] = out.values.detach().float().cpu()
            streams.bootstrap[micro.bootstrap] = out.bootstrap_values.detach().float().cpu()
        if streams.target_q is not None and streams.kl is not None:
            assert out.soft is not None and out.soft.target_q is not None
            streams.target_q[micro.tokens] = out.soft.target_q.cpu()
            streams.kl[micro.tokens] = out.soft.kl.detach().cpu()
        if streams.ref_logprobs is not None:
            streams.ref_logprobs[micro.tokens] = self.engine.reference_logprobs(micro.batch).float().cpu()

    def _credit(self, step: _Step) -> Credit:
        """Advantages and returns [K] of the whole step; right for every trajectory whose tokens are recorded.

        Advantages are whitened over the step's tokens (or actions) on all ranks where the algorithm asks for it.
        """
        credit = self.algorithm.credit(step.streams, self.settings)
        if not self.settings.normalize_advantages:
            return credit
        moments = self.algorithm.moments(credit, step.streams, step.weights)
        mean, std = mean_std(torch.tensor(self.engine.reduce(moments.tolist()), dtype=torch.float64))
        return replace(credit, advantages=whiten(credit.advantages, mean, std))

    def _update(self, step: _Step, micros: list[_Micro]) -> dict[str, float]:
        """One optimiser step over ``micros``; returns its metrics summed over micro-batches and ranks."""
        counts = Denominators.of(step.streams, step.weights, torch.cat([m.tokens for m in micros]))
        total = torch.tensor(self.engine.reduce(counts.to_tensor().tolist()), dtype=torch.float64)
        denominators = Denominators.from_tensor(total)
        sums: Counter[str] = Counter()
        losses = []
        for i, micro in enumerate(micros):
            out = self._forward(micro, records=step.single_pass, trains=True)
            if step.single_pass:
                self._record(step, micro, out)
                if self._credit_reads_forward:
                    step.credit = self._credit(step)
            assert step.credit is not None
            inputs = gather_inputs(
                step.streams,
                step.credit,
                step.weights,
                micro.tokens,
                denominators,
                logprobs=out.logprobs,
                entropy=out.entropy,
                values=out.values,
                q=None if out.soft is None else out.soft.q,
                expected_q=None if out.soft is None else out.soft.expected_q,
                kl=None if out.soft is None else out.soft.kl,
            )
            result = self.algorithm.loss(inputs, self.settings)
            self.engine.backward(result.loss, last=i == len(micros) - 1)
            losses.append(float(result.loss.detach()))
            sums.update({key: float(value) for key, value in result.metrics.items()})
        names = sorted(sums)
        shown = summarise(dict(zip(names, self.engine.reduce([sums[n] for n in names]), strict=True)))
        held = self._holds_policy(shown.get("approx_kl", 0.0))
        norm = self._apply(step, micros, losses, held=held)
        lr_scale = self._lr_scale(self._updates_done - 1)
        rates = {"learner/lr": 0.0 if held else self.config.learner.lr * lr_scale, "learner/grad_norm": norm}
        if self._wants_values or self._wants_soft:
            rates |= {"learner/critic_lr": self.config.learner.critic_lr * lr_scale, "learner/policy_held": float(held)}
        return {f"learner/{name}": value for name, value in shown.items()} | rates

    def _holds_policy(self, approx_kl: float) -> bool:
        """Whether the next optimiser step leaves the policy as it is: its critic warms up, or it has gone far enough in this step."""
        learner = self.config.learner
        warming = self._updates_done < learner.critic_warmup * learner.updates_per_step * learner.epochs
        return warming or (learner.max_kl is not None and approx_kl > learner.max_kl)

    def _apply(self, step: _Step, micros: list[_Micro], losses: list[float], *, held: bool) -> float:
        """The optimiser step (``held``: of the critic alone), unless something is not finite on any rank; returns the gradient norm."""
        (bad,) = self.engine.reduce([float(not all(map(math.isfinite, losses)))], dist.ReduceOp.MAX)
        if bad:
            self.engine.discard()
            self._stop_not_finite(step, micros, losses, math.nan)
        norm = self.engine.step(self._lr_scale(self._updates_done), held=("policy",) if held else ())
        if not math.isfinite(norm):
            self._stop_not_finite(step, micros, losses, norm)
        if self._wants_soft:
            self.engine.policy.move_target(self.algorithm.target_decay(self.settings))
        self._updates_done += 1
        return norm

    def _lr_scale(self, update: int) -> float:
        """Of optimiser step ``update``: it follows from its number and the job alone, so that a resumed run goes on with it."""
        config = self.config
        updates = config.trainer.steps * config.learner.updates_per_step * config.learner.epochs
        return rate_scale(update, config.learner.lr_schedule, warmup=config.learner.warmup_steps, updates=updates)

    def _stop_not_finite(self, step: _Step, micros: list[_Micro], losses: list[float], norm: float) -> NoReturn:
        """Save this rank's share of the update and raise."""
        folder = self.config.run_dir / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"update-{self._updates_done:06d}-rank-{self.engine.rank:05d}.pt"
        content = {"trajectories": step.trajectories, "streams": step.streams, "weights": step.weights, "losses": losses, "grad_norm": norm}
        torch.save(content | {"micro_batches": [m.batch for m in micros]}, path)
        what = "a gradient" if all(map(math.isfinite, losses)) else f"the loss of micro-batch {_first_bad(losses)}"
        raise NonFiniteError(
            f"update {self._updates_done}: {what} is not finite; weights were left as they are. The batch is in {path} "
            "(torch.load with weights_only=False). Usual causes: learner.lr too high, rewards of extreme size"
        )

    # -- metrics -------------------------------------------------------------------------------------------

    def _mismatch(self, step: _Step) -> dict[str, float]:
        """Rollout against learner log-probs of the step's tokens, before its first update."""
        assert step.streams.old_logprobs is not None
        return self._compare(step.streams.old_logprobs, step.streams.behaviour_logprobs, step.weights > 0)

    def _compare(self, ours: torch.Tensor, behaviour: torch.Tensor, counted: torch.Tensor) -> dict[str, float]:
        ours, behaviour = ours[counted].double(), behaviour[counted].double()
        difference = (ours - behaviour).abs()
        k3 = kl_estimate(behaviour, ours, "k3")
        absolute, k3_sum, n = self.engine.reduce([float(difference.sum()), float(k3.sum()), float(len(ours))])
        (largest,) = self.engine.reduce([float(difference.max()) if len(ours) else 0.0], dist.ReduceOp.MAX)
        n = max(n, 1.0)
        return {"mismatch/mean_abs": absolute / n, "mismatch/max_abs": largest, "mismatch/k3": k3_sum / n}

    def _throughput(self, step: _Step, seconds: float) -> dict[str, float]:
        micros = [m for micros in step.updates for m in micros]
        counts = [
            float(step.weights.sum()),
            float(step.streams.n_tokens - step.weights.sum()),
            float(sum(m.batch.n_packed for m in micros)),
            float(sum(m.batch.unshared_tokens for m in micros)),
        ]
        trained, dropped, packed, unshared = self.engine.reduce(counts)
        return {
            "learner/tokens_trained": trained,
            "learner/tokens_dropped": dropped,
            "learner/tokens_packed": packed,
            "learner/tokens_shared": 1 - packed / max(unshared, packed, 1.0),
            "learner/micro_batches": float(len(micros)),
            "learner/seconds": seconds,
            "learner/tokens_per_s": unshared / seconds,
        }

    # -- looking at the policy -----------------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(self, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        """log pi of every trainable token in the order of ``flatten``, float32 [K]. All ranks get the same trajectories."""
        result = torch.zeros(sum(t.trainable_tokens for t in trajectories))
        learner = self.config.learner
        packed = pack(
            trajectories, tokens_per_microbatch=learner.tokens_per_microbatch, share_prefixes=learner.share_prefixes, bootstrap="none"
        )
        for batch in packed:
            out = self.engine.forward(batch, want_values=False, want_entropy=False, want_q=False, want_target=False)
            result[batch.stream_index] = out.logprobs.float().cpu()
        return result

    def mismatch(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Rollout against learner log-probs: ``mean_abs``, ``max_abs`` (nats), ``k3``, and the ``tokens`` compared."""
        streams = flatten(trajectories)
        counted = trainable_weights(streams) > 0
        compared = self._compare(self.logprobs(trajectories), streams.behaviour_logprobs, counted)
        return {key.removeprefix("mismatch/"): value for key, value in compared.items()} | {"tokens": float(counted.sum())}

    # -- weights and checkpoints ---------------------------------------------------------------------------

    @property
    def updates_done(self) -> int:
        """Optimiser steps so far, over the whole run: what says which weights these are."""
        return self._updates_done

    def state_for_sync(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor) of the policy, adapters merged, in the compute dtype.

        Every rank must exhaust it: under ZeRO 3 each parameter is gathered while it is yielded, and freed after.
        """
        for name, tensor in policy_state(self.engine.policy, self.engine.gathered):
            yield name, tensor.detach().to(self.compute_dtype)

    def save(self, folder: Path) -> None:
        """Write this rank's state into ``folder``. Raises ``OSError`` on all ranks where one cannot."""
        save_state(folder, self.engine, {"updates_done": self._updates_done})

    def load(self, folder: Path) -> None:
        """Continue from ``save``, bit for bit. Raises ``CheckpointError``."""
        self._updates_done = int(load_state(folder, self.engine)["updates_done"])

    def export(self, folder: Path) -> None:
        """Write the policy as a plain Hugging Face folder with its tokenizer, and the head of a process reward or value model.

        A policy's critic is not part of it.
        """
        writes = self.engine.rank == 0
        state = {name: tensor.to("cpu", copy=True) for name, tensor in self.state_for_sync() if writes}
        if self._wants_values and self.config.kind != "rl":
            head = self.engine.policy.value_head
            assert head is not None
            with self.engine.gathered(head.parameters()):
                if writes:
                    save_head(folder, head, HeadInfo.of(self.config))
        if writes:
            save_policy(self.engine.policy, state, folder)
            model = self.config.model
            load_tokenizer(resolve_model(model.path), trust_remote_code=model.trust_remote_code).save_pretrained(folder)


def _first_bad(losses: list[float]) -> int:
    return next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
