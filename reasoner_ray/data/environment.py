"""Gymnasium environments with text observations and actions as a task: an item is one episode, named by its seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reasoner_ray.data.tasks import Item, Task, register_task
from reasoner_ray.envs.host import check_environment
from reasoner_ray.envs.player import EnvironmentSpec
from reasoner_ray.errors import ConfigError


@register_task("environment")
class EnvironmentTask(Task):
    """Episodes of the environment ``id`` (a Gymnasium id, or ``module:Class``) made with ``kwargs``.

    Held-out episodes have seeds of their own; with ``variants`` (label -> keyword arguments laid over ``kwargs``) they
    are played in each variant too, and evaluated label by label. ``isolate`` plays in processes of their own, where a
    step may take ``timeout_s`` seconds; by default only the built-in finite environments are played in this process.
    """

    default_scorer = "environment"

    def __init__(
        self,
        *,
        seed: int = 0,
        id: str,
        kwargs: Mapping[str, Any] | None = None,
        variants: Mapping[str, Mapping[str, Any]] | None = None,
        episodes: int = 4096,
        held_out_episodes: int = 1,
        isolate: bool | None = None,
        timeout_s: float = 30.0,
        stop: Sequence[str] = ("\n",),
    ) -> None:
        if episodes < 1 or held_out_episodes < 1:
            raise ConfigError(f"task.args.episodes and held_out_episodes must be at least 1 (got {episodes}, {held_out_episodes})")
        base = dict(kwargs or {})
        self.stop = tuple(stop)
        self._seed, self._sizes = seed, (episodes, held_out_episodes)
        self._specs = {
            label: EnvironmentSpec(id=id, kwargs={**base, **extra}, isolate=isolate, timeout_s=timeout_s)
            for label, extra in {"training": {}, **(variants or {})}.items()
        }

    def check(self) -> None:
        """Raises ``ConfigError`` or ``EnvironmentProblem`` where an environment cannot be made."""
        for spec in self._specs.values():
            check_environment(spec)

    def train(self) -> Sequence[Item]:
        """Episodes with seeds that follow from the job's."""
        return [self._item("training", (self._seed + 1) * 1_000_003 + i) for i in range(self._sizes[0])]

    def held_out(self) -> Sequence[Item]:
        """The same episodes for every seed of the job, label by label in turns."""
        return [self._item(label, i) for i in range(self._sizes[1]) for label in self._specs]

    def _item(self, label: str, seed: int) -> Item:
        spec = self._specs[label]
        info = {"environment": spec, "seed": seed, "label": label}
        return Item(id=f"{label}-{seed}", prompt=f"{spec.id} ({label}, seed {seed})", answer="", info=info)
