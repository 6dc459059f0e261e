"""The learner of one rank: windows of recorded trajectories in, an updated network and its metrics out.

Every rank reads all data and draws the same windows; of each batch it takes every ``ranks``-th. So an update is the same however many
ranks there are. Online (Zheng et al. 2022, arXiv 2202.05607) the trajectories come from a buffer, and the entropy is held up by a
dual variable:  min_theta J - lambda H,  min_lambda lambda (H - beta),  J = E[-log pi(a)],  both means over the steps that are real.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from reasoner_ray.agents import SCRATCH
from reasoner_ray.agents.sequence.data import load_recordings
from reasoner_ray.agents.sequence.network import DecisionTransformer, load_weights
from reasoner_ray.agents.sequence.recordings import Recording, delayed, moments
from reasoner_ray.agents.sequence.windows import TrajectoryBuffer, Windows, sample
from reasoner_ray.errors import CheckpointError, NonFiniteError
from reasoner_ray.learner.checkpoint import load_state, save_state
from reasoner_ray.learner.engine import GradientEngine, start_process_group
from reasoner_ray.learner.group import WholeBatchLearners
from reasoner_ray.learner.schedule import rate_scale

if TYPE_CHECKING:
    from reasoner_ray.agents.sequence.settings import OnlineConfig
    from reasoner_ray.config import JobConfig


class SequenceLearner:
    """A network that learns. Every rank calls the same methods in the same order."""

    def __init__(self, config: JobConfig, rank: int = 0, world_size: int = 1, store: dist.Store | None = None) -> None:
        """``store`` is where the ranks meet, needed from two on. Raises ``ReasonerError``."""
        self.config, self.settings = config, config.sequence
        if config.learner.torch_threads is not None:
            torch.set_num_threads(config.learner.torch_threads)
        self.recordings, interface, horizon = load_recordings(config)
        start_process_group(rank, world_size, store, config.learner.collective_timeout_s)
        torch.manual_seed(config.seed)  # every rank draws the same first weights
        self.network = DecisionTransformer(interface, config.sequence, horizon)
        if config.model.path == SCRATCH:
            self.network.measure_in(*moments(self.recordings))
        else:
            load_weights(self.network, Path(config.model.path))
        self._units = self.network.units
        self.network.to("cuda" if torch.cuda.is_available() else "cpu")
        trained = self.network.trained
        groups = [{"name": "network", "params": list(trained().values()), "lr": config.learner.lr}]
        self.engine = GradientEngine(self.network, trained, groups, config.learner)
        online = config.sequence.online
        self.dual = Temperature(online, interface.choices, interface.action) if online is not None else None
        self.buffer = TrajectoryBuffer(online.buffer, self.recordings) if online is not None else None
        self._updates_done = 0

    # -- training ------------------------------------------------------------------------------------------

    def train_step(self, played: Sequence[Sequence[Recording]]) -> dict[str, float]:
        """Learn ``learner.updates_per_step`` times, after what was ``played`` has joined the buffer; metrics, the same on all ranks.

        Raises ``NonFiniteError`` on all ranks, weights unchanged, where a loss or gradient is not finite.
        """
        started, learner = time.perf_counter(), self.config.learner
        if self.buffer is not None:
            for recordings in played:
                self.buffer.add([delayed(r) for r in recordings] if self.settings.delayed else recordings)
        source = self._source()
        passes = [self._update(source) for _ in range(learner.updates_per_step)]
        metrics = {key: sum(p[key] for p in passes) / len(passes) for key in passes[0]}
        if self.buffer is not None:
            metrics["buffer/trajectories"] = float(len(self.buffer.recordings))
        seconds = time.perf_counter() - started
        return metrics | {"learner/seconds": seconds, "learner/updates_per_s": len(passes) / seconds}

    def _source(self) -> list[Recording]:
        """The data sets, until the online steps begin; then the buffer."""
        online = self.settings.online
        if online is None or self.buffer is None or self._updates_done < online.offline_steps * self.config.learner.updates_per_step:
            return self.recordings
        return self.buffer.recordings

    def _update(self, source: Sequence[Recording]) -> dict[str, float]:
        """One optimiser step on windows of ``source``; its metrics."""
        rng = np.random.default_rng([self.config.seed, self._updates_done])
        batch = sample(source, self._units, self.settings.batch, self.settings.context, rng)
        steps = float(batch.mask.sum())
        weight = 0.0 if self.dual is None else self.dual.value
        imitation, entropy = 0.0, 0.0
        pieces = self._micro_batches(batch)
        for i, windows in enumerate(pieces):
            out = self.engine.call(windows)
            real = windows.mask.float()
            part = (self.network.head.loss(out, windows.actions) * real).sum() / steps
            loss = part
            if self.dual is not None:
                spread = (self.network.head.entropy(out) * real).sum() / steps
                loss = part - weight * spread
                entropy += float(spread.detach())
            imitation += float(part.detach())
            self.engine.backward(loss, last=i == len(pieces) - 1)
        imitation, entropy = self.engine.reduce([imitation, entropy])
        norm = self._apply(batch, imitation - weight * entropy)
        rate = self.config.learner.lr * self._lr_scale(self._updates_done - 1)
        metrics = {"learner/loss": imitation - weight * entropy, "learner/lr": rate, "learner/grad_norm": norm}
        if self.dual is not None:
            self.dual.step(entropy)
            metrics |= {"learner/imitation": imitation, "learner/entropy": entropy, "learner/temperature": weight}
        return metrics

    def _micro_batches(self, batch: Windows) -> list[Windows]:
        """This rank's windows, in as many pieces as every rank has (ZeRO 2 reduces after each)."""
        ranks, tokens = self.engine.world_size, self.network.tokens * self.settings.context
        most = max(1, self.config.learner.tokens_per_microbatch // tokens)
        own = torch.arange(len(batch))[self.engine.rank :: ranks]
        pieces = math.ceil(math.ceil(len(batch) / ranks) / most)
        return [batch.rows(rows).to(self.engine.device) for rows in own.tensor_split(pieces)]

    def _apply(self, batch: Windows, loss: float) -> float:
        """The optimiser step, unless something is not finite; ``loss`` is that of all ranks. Returns the gradient's norm."""
        if not math.isfinite(loss):
            self.engine.discard()
            self._stop_not_finite(batch, "the loss")
        norm = self.engine.step(self._lr_scale(self._updates_done))
        if not math.isfinite(norm):
            self._stop_not_finite(batch, "a gradient")
        self._updates_done += 1
        return norm

    def _stop_not_finite(self, batch: Windows, what: str) -> NoReturn:
        """Save the batch and raise."""
        folder = self.config.run_dir / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"update-{self._updates_done:06d}-rank-{self.engine.rank:05d}.pt"
        torch.save({name: getattr(batch, name) for name in Windows.__dataclass_fields__}, path)
        raise NonFiniteError(
            f"update {self._updates_done}: {what} is not finite; weights were left as they are. The windows are in {path} (torch.load). "
            "Usual causes: learner.lr too high, sequence.return_scale too small"
        )

    def _lr_scale(self, update: int) -> float:
        """Of optimiser step ``update``, by the job's schedule."""
        learner = self.config.learner
        updates = self.config.trainer.steps * learner.updates_per_step
        return rate_scale(update, learner.lr_schedule, warmup=learner.warmup_steps, updates=updates)

    # -- weights and checkpoints ---------------------------------------------------------------------------

    def state_for_sync(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every weight, and of what the inputs are measured in."""
        for name, tensor in self.network.state_dict().items():
            yield name, tensor.detach()

    def save(self, folder: Path) -> None:
        """Write this rank's state into ``folder``. Raises ``OSError`` on all ranks where one cannot."""
        counters: dict[str, Any] = {"updates_done": self._updates_done}
        if self.dual is not None and self.buffer is not None:
            counters |= {"dual": self.dual.state_dict(), "buffer": self.buffer.recordings}
        save_state(folder, self.engine, counters)

    def load(self, folder: Path) -> None:
        """Continue from ``save``, bit for bit. Raises ``CheckpointError``."""
        counters = load_state(folder, self.engine)
        if ("dual" in counters) != (self.dual is not None):
            was = "with" if "dual" in counters else "without"
            raise CheckpointError(f"{folder} was written {was} sequence.online: resume likewise, or begin a new run from its model")
        self._updates_done = int(counters["updates_done"])
        if self.dual is not None and self.buffer is not None:
            self.dual.load_state_dict(counters["dual"])
            if not all(hasattr(recording, "last") for recording in counters["buffer"]):  # unpickling fills in nothing
                raise CheckpointError(
                    f"{folder} was written by an earlier version, whose episodes lack their last observation; go on with that version, or "
                    "begin a new run from its model"
                )
            self.buffer.recordings = counters["buffer"]

    def export(self, folder: Path) -> None:
        """Write what ``load_network`` reads."""
        if self.engine.rank == 0:
            self.network.save(folder)


class Temperature:
    """The dual variable of the entropy's floor, lambda = exp(log lambda), learnt by Adam: min lambda (H - beta)."""

    def __init__(self, online: OnlineConfig, choices: int, dims: int) -> None:
        """The floor of an action of ``dims`` numbers is -``dims`` nats by default (the paper's beta); of choices 0, which never binds."""
        default = 0.0 if choices else -float(dims)
        self.floor = default if online.entropy_floor is None else online.entropy_floor
        self._log = torch.tensor(math.log(online.temperature), requires_grad=True)
        self._adam = torch.optim.Adam([self._log], lr=online.temperature_lr)

    @property
    def value(self) -> float:
        """lambda."""
        return float(self._log.detach().exp())

    def step(self, entropy: float) -> None:
        """Raise lambda where the entropy is below its floor, else lower it."""
        self._adam.zero_grad()
        (self._log.exp() * (entropy - self.floor)).backward()
        self._adam.step()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"log": float(self._log.detach()), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        with torch.no_grad():
            self._log.fill_(state["log"])
        self._adam.load_state_dict(state["adam"])


class SequenceLearners(WholeBatchLearners):
    """All ranks, as the driver uses them."""

    def __init__(self, config: JobConfig) -> None:
        super().__init__(config, make=SequenceLearner)
