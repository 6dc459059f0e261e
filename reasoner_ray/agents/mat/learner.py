"""The learner of one rank: segments of all workers in, an updated network and its metrics out; and the ranks together.

Every rank reads all segments and computes the same credit and normalisation; of each minibatch it takes every ``ranks``-th row. So
an update is the same however many ranks there are, and no moments need to be exchanged.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from reasoner_ray.agents import SCRATCH
from reasoner_ray.agents.mat.network import MultiAgentTransformer
from reasoner_ray.agents.mat.ppo import Rows, Totals, normalised, team_credit, team_loss
from reasoner_ray.agents.mat.settings import MatConfig
from reasoner_ray.agents.mat.value_norm import ValueNorm
from reasoner_ray.agents.mat.worker import Segment, join
from reasoner_ray.agents.weights import ABOUT, WEIGHTS, check_settings, read_weights
from reasoner_ray.envs.multi_agent.spec import TeamSpec
from reasoner_ray.errors import ModelError, NonFiniteError
from reasoner_ray.learner.checkpoint import load_state, save_state
from reasoner_ray.learner.engine import GradientEngine, start_process_group
from reasoner_ray.learner.group import WholeBatchLearners
from reasoner_ray.learner.schedule import rate_scale
from reasoner_ray.losses import summarise

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """A task's environment steps as rows, on the device that learns."""

    value_norm: ValueNorm  # of the task
    segment: Segment  # its tensors [R, n, ...]
    parts: torch.Tensor  # float32 [n, parts]; which parts the agents' actions have
    advantages: torch.Tensor  # float32 [R, n]
    returns: torch.Tensor  # float32 [R, n]; in units of reward
    policy_weights: torch.Tensor  # float32 [R, n]
    value_weights: torch.Tensor  # float32 [R, n]


class MatLearner:
    """A network that learns one task, or several at once. Every rank calls the same methods in the same order."""

    def __init__(
        self,
        config: JobConfig,
        rank: int = 0,
        world_size: int = 1,
        store: dist.Store | None = None,
        *,
        team: TeamSpec,
        others: Sequence[TeamSpec] = (),
    ) -> None:
        """``store`` is where the ranks meet, needed from two on; ``others`` are the teams of further tasks, padded to the same sizes.

        Raises ``ModelError``, ``EnvironmentProblem``.
        """
        self.config = config
        if config.learner.torch_threads is not None:
            torch.set_num_threads(config.learner.torch_threads)
        start_process_group(rank, world_size, store, config.learner.collective_timeout_s)
        torch.manual_seed(config.seed)  # every rank draws the same first weights
        self.team, self.teams = team, (team, *others)
        self.network = MultiAgentTransformer(team, config.mat)
        # One a task: rewards of two tasks may differ in size, and each task's values are to be of size 1 all the same.
        self.value_norms = [ValueNorm(config.mat.value_norm_beta) for _ in self.teams]
        if config.model.path != SCRATCH:
            load_weights(self.network, Path(config.model.path), team, self.value_norms, config.mat)
        self.network.to("cuda" if torch.cuda.is_available() else "cpu")
        groups = [{"name": "network", "params": list(self.network.parameters()), "lr": config.learner.lr}]
        self.engine = GradientEngine(self.network, lambda: dict(self.network.named_parameters()), groups, config.learner)
        self._updates_done = 0

    # -- training ------------------------------------------------------------------------------------------

    def train_step(self, segments: Sequence[Segment]) -> dict[str, float]:
        """Learn from all workers' segments; returns metrics of the whole step, the same on all ranks.

        Segment i is of task i modulo their number. Every update has its share of each task's steps, and its loss is the mean over all
        agents' steps. Returns and advantages are normalised by task, since rewards of two tasks may differ in size.

        Raises ``NonFiniteError`` on all ranks, weights unchanged, where a loss or gradient is not finite.
        """
        started, learner = time.perf_counter(), self.config.learner
        tasks = len(self.teams)
        joined = [join(segments[task::tasks]) for task in range(tasks)]
        data = [self._prepare(segment, task) for task, segment in enumerate(joined)]
        passes = []
        for _ in range(learner.epochs):
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self._updates_done)
            shuffled = [torch.randperm(segment.rows, generator=generator).tensor_split(learner.updates_per_step) for segment in joined]
            for shares in zip(*shuffled, strict=True):
                passes.append(self._update([(d, share.to(self.engine.device)) for d, share in zip(data, shares, strict=True)]))
        metrics = {key: sum(p[key] for p in passes if key in p) / sum(key in p for p in passes) for key in passes[0]}
        seconds = time.perf_counter() - started
        return metrics | {
            "mismatch/max_abs": passes[0]["mismatch/max_abs"],  # later passes look at weights that have moved on
            "learner/seconds": seconds,
            "learner/updates_per_s": len(passes) / seconds,
            **self._value_moments(),
        }

    def _value_moments(self) -> dict[str, float]:
        """Mean and deviation of returns, of each of several tasks by its label."""
        labels, moments = list(self.config.multi_agent.tasks), {}
        for ending, norm in zip([f"/{label}" for label in labels] or [""], self.value_norms, strict=True):
            moments[f"learner/value_mean{ending}"], moments[f"learner/value_std{ending}"] = norm.moments
        return moments

    def _prepare(self, segment: Segment, task: int) -> _Data:
        """Credit for all steps of a task, in units of reward, and the rows that minibatches are drawn from."""
        mat, active, value_norm = self.config.mat, segment.active, self.value_norms[task]
        scale = value_norm.denormalise if mat.value_norm else (lambda x: x)
        credit = team_credit(
            segment.rewards,
            scale(segment.values),
            scale(segment.next_values),
            segment.terminated,
            segment.truncated,
            active,
            segment.next_active,
            advantage=mat.advantage,
            gamma=mat.gamma,
            gae_lambda=mat.gae_lambda,
        )
        counted = active if mat.mask_policy else torch.ones_like(active)
        # A team goes on earning for an agent that has died, so credit bootstraps from its value until the episode ends.
        trained = active if mat.mask_value and self.config.multi_agent.reward == "own" else torch.ones_like(active)
        advantages = normalised(credit.advantages, counted) if mat.normalise_advantage else credit.advantages
        device = self.engine.device

        def flat(x: torch.Tensor) -> torch.Tensor:
            return x.flatten(0, 1).to(device)

        return _Data(
            value_norm=value_norm,
            segment=Segment(**{name: flat(x) for name, x in _tensors(segment).items()}),
            parts=torch.from_numpy(self.teams[task].actions.parts).float().to(device),
            advantages=flat(advantages),
            returns=flat(credit.returns),
            policy_weights=flat(counted.float()),
            value_weights=flat(trained.float()),
        )

    def _update(self, batch: Sequence[tuple[_Data, torch.Tensor]]) -> dict[str, float]:
        """One optimiser step on rows (of all ranks) of each task; its metrics."""
        mat, engine = self.config.mat, self.engine
        if mat.value_norm:
            for data, part in batch:
                data.value_norm.update(data.returns[part], data.value_weights[part])
        counted = sum(float(data.policy_weights[part].sum()) for data, part in batch)
        judged = sum(float(data.value_weights[part].sum()) for data, part in batch)
        totals = Totals(policy=counted, value=max(judged, 1.0))
        sums: Counter[str] = Counter()
        losses, farthest = [], 0.0
        micros = [(data, rows) for data, part in batch for rows in self._micro_batches(part, len(data.parts))]
        for i, (data, rows) in enumerate(micros):
            inputs = self._rows(data, rows)
            loss, metrics = team_loss(
                inputs,
                totals,
                clip=mat.clip,
                clip_value=mat.clip_value,
                huber_delta=mat.huber,
                entropy_coef=mat.entropy,
                value_coef=mat.value_coef,
            )
            engine.backward(loss, last=i == len(micros) - 1)
            losses.append(float(loss.detach()))
            sums.update({key: float(value) for key, value in metrics.items()})
            if len(rows):
                farthest = max(farthest, float((inputs.logprobs - inputs.old_logprobs).detach().abs().max()))
        norm = self._apply(batch, losses)
        names = sorted(sums)
        shown = summarise(dict(zip(names, engine.reduce([sums[n] for n in names]), strict=True)))
        (farthest,) = engine.reduce([farthest], dist.ReduceOp.MAX)
        scale = self._lr_scale(self._updates_done - 1)
        rates = {"learner/lr": self.config.learner.lr * scale, "learner/grad_norm": norm, "mismatch/max_abs": farthest}
        return {f"learner/{name}": value for name, value in shown.items()} | rates

    def _micro_batches(self, part: torch.Tensor, n_agents: int) -> list[torch.Tensor]:
        """This rank's rows of ``part``, in as many pieces as every rank has (ZeRO 2 reduces after each)."""
        ranks = self.engine.world_size
        most = max(1, self.config.learner.tokens_per_microbatch // n_agents)
        pieces = math.ceil(math.ceil(len(part) / ranks) / most)
        return list(part[self.engine.rank :: ranks].tensor_split(pieces))

    def _rows(self, data: _Data, rows: torch.Tensor) -> Rows:
        """The network's view of ``rows`` beside what was known of them."""
        segment = data.segment
        order = segment.order[rows] if segment.order.shape[-1] else None
        judged = self.engine.call(segment.observations[rows], segment.legal[rows], segment.actions[rows], order, data.parts)
        targets = data.returns[rows]
        return Rows(
            logprobs=judged.logprobs,
            entropy=judged.entropy,
            values=judged.values,
            old_logprobs=segment.logprobs[rows],
            old_values=segment.values[rows],
            advantages=data.advantages[rows],
            targets=data.value_norm.normalise(targets) if self.config.mat.value_norm else targets,
            policy_weights=data.policy_weights[rows],
            value_weights=data.value_weights[rows],
            parts=data.parts,
        )

    def _apply(self, batch: Sequence[tuple[_Data, torch.Tensor]], losses: list[float]) -> float:
        """The optimiser step, unless something is not finite on any rank; returns the gradient norm."""
        (bad,) = self.engine.reduce([float(not all(map(math.isfinite, losses)))], dist.ReduceOp.MAX)
        if bad:
            self.engine.discard()
            self._stop_not_finite(batch, losses, math.nan)
        norm = self.engine.step(self._lr_scale(self._updates_done))
        if not math.isfinite(norm):
            self._stop_not_finite(batch, losses, norm)
        self._updates_done += 1
        return norm

    def _stop_not_finite(self, batch: Sequence[tuple[_Data, torch.Tensor]], losses: list[float], norm: float) -> NoReturn:
        """Save the minibatch, the rows of each task, and raise."""
        folder = self.config.run_dir / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"update-{self._updates_done:06d}-rank-{self.engine.rank:05d}.pt"
        kept = [
            {name: x[part].cpu() for name, x in (_tensors(data.segment) | {"advantages": data.advantages, "returns": data.returns}).items()}
            for data, part in batch
        ]
        torch.save({"rows": kept, "losses": losses, "grad_norm": norm}, path)
        what = "a gradient" if all(map(math.isfinite, losses)) else "the loss"
        raise NonFiniteError(
            f"update {self._updates_done}: {what} is not finite; weights were left as they are. The minibatch is in {path} "
            "(torch.load). Usual causes: learner.lr too high, rewards of extreme size"
        )

    def _lr_scale(self, update: int) -> float:
        """Of optimiser step ``update``, by the job's schedule."""
        learner = self.config.learner
        updates = self.config.trainer.steps * learner.updates_per_step * learner.epochs
        return rate_scale(update, learner.lr_schedule, warmup=learner.warmup_steps, updates=updates)

    # -- weights and checkpoints ---------------------------------------------------------------------------

    def state_for_sync(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every weight."""
        for name, tensor in self.network.state_dict().items():
            yield name, tensor.detach()

    def save(self, folder: Path) -> None:
        """Write this rank's state into ``folder``. Raises ``OSError`` on all ranks where one cannot."""
        save_state(folder, self.engine, {"updates_done": self._updates_done, "value_norm": self._moments()})

    def load(self, folder: Path) -> None:
        """Continue from ``save``, bit for bit. Raises ``CheckpointError``."""
        counters = load_state(folder, self.engine)
        self._updates_done = int(counters["updates_done"])
        for norm, state in zip(self.value_norms, _by_task(counters["value_norm"], len(self.value_norms)), strict=True):
            norm.load_state_dict(state)

    def export(self, folder: Path) -> None:
        """Write the network with its team, its settings and the moments its values are in units of: what ``load_network`` reads."""
        if self.engine.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous().cpu() for name, tensor in self.state_for_sync()}, folder / WEIGHTS)
            about: dict[str, Any] = {"team": self.team.to_dict(), "mat": self.config.mat.model_dump(mode="json")}
            about["value_norm"] = self._moments()
            (folder / ABOUT).write_text(json.dumps(about, indent=1))

    def _moments(self) -> list[dict[str, float]]:
        return [norm.state_dict() for norm in self.value_norms]


class MatLearners(WholeBatchLearners):
    """All ranks, as the driver uses them. ``of`` must be called before ``start``: teams are what the workers' environments say."""

    def __init__(self, config: JobConfig) -> None:
        super().__init__(config)

    def of(self, team: TeamSpec, others: Sequence[TeamSpec] = ()) -> None:
        """Learn for ``team``, and the ``others`` of further tasks."""
        self._make = partial(MatLearner, team=team, others=tuple(others))


SAVED = ("variant", "blocks", "width", "heads", "expansion", "value_norm")
"""Settings of ``mat`` that say what a network's weights mean; the others say how it learns, which may change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _About:
    """What lies beside a network's weights."""

    team: TeamSpec
    settings: MatConfig
    given: dict[str, Any]  # the settings that the file names
    moments: list[dict[str, float]]  # by task


def load_network(folder: Path, team: TeamSpec | None = None, settings: MatConfig | None = None) -> tuple[MultiAgentTransformer, TeamSpec]:
    """A network that ``MatLearner.export`` wrote, and the team it acts for: ``team``, or the one it was trained on (the first, of several).

    ``settings`` are those that it is to have; None: whatever it was trained with. Raises ``ModelError``.
    """
    about = _about(folder)
    team = about.team if team is None else team
    network = MultiAgentTransformer(team, settings or about.settings)
    load_weights(network, folder, team, settings=settings)
    return network.eval(), team


def load_weights(
    network: MultiAgentTransformer,
    folder: Path,
    team: TeamSpec,
    value_norms: Sequence[ValueNorm] = (),
    settings: MatConfig | None = None,
) -> None:
    """Take the weights in ``folder``, and for ``value_norms`` the moments that their values are in units of, task by task.

    Where they are of another number of tasks, whose returns may be of any size, the moments begin anew. The number of agents may be
    another. Raises ``ModelError`` where the weights are of a network of another shape, of other ``settings``, or of one that is shown
    its observations otherwise.
    """
    about = _about(folder)
    if misfit := about.team.misfit(team):
        raise ModelError(
            f"{folder} is a network of other sizes or observations ({misfit}); give both jobs the same ones with "
            "multi_agent.pad.observation, .agents, .choices and .dims, .standardise and .features, or take an environment like the one it "
            "was trained on"
        )
    if settings is not None:
        check_settings(folder, "mat", about.given, settings.model_dump(mode="json"), SAVED)
    read_weights(network, folder, "mat")
    if len(about.moments) == len(value_norms):
        for norm, state in zip(value_norms, about.moments, strict=True):
            norm.load_state_dict(state)


def _about(folder: Path) -> _About:
    try:
        tree = json.loads((folder / ABOUT).read_text())
        names, given = list(ValueNorm(0.0).state_dict()), dict(tree["mat"])
        moments = [{name: float(state[name]) for name in names} for state in _by_task(tree["value_norm"], 1)]
        return _About(team=TeamSpec.from_dict(tree["team"]), settings=MatConfig.model_validate(given), given=given, moments=moments)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder} holds no network of kind mat ({type(error).__name__}: {error}); give the folder model/ of a run"
        ) from error


def _by_task(states: Any, tasks: int) -> list[dict[str, float]]:
    """The moments of each task; files from before each task had its own hold one state, which is that of all."""
    return [states] * tasks if isinstance(states, dict) else list(states)


def _tensors(segment: Segment) -> dict[str, torch.Tensor]:
    return {name: getattr(segment, name) for name in Segment.__dataclass_fields__}
