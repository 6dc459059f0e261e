"""Procedural reasoning tasks of the ``reasoning-gym`` package, each with its own verifier as the scorer."""

from __future__ import annotations

from typing import Any

from reasoner_ray.data.generated import GeneratedTask
from reasoner_ray.data.questions import build_prompt
from reasoner_ray.data.tasks import Item, Message, register_task
from reasoner_ray.errors import ConfigError, EnvironmentProblem
from reasoner_ray.registry import suggest

TAGGED = "Reason step by step, and put your final answer between <answer> and </answer>."
# Item i of a set seeded s is drawn from s + i, so neighbouring seeds would overlap. Some sets take 32 bits at most.
_SEED_STRIDE, _SEED_LIMIT = 10_000_019, 3_900_000_000
_HELD_OUT_SEED = 4_000_000_000


@register_task("reasoning_gym")
class ReasoningGymTask(GeneratedTask):
    """``dataset`` is any name that reasoning-gym knows, ``config`` its difficulty knobs.

    Training and held-out items come from seeds that lie far apart; training items whose question is also held out are
    dropped, which only happens in small spaces. The held-out set does not depend on ``seed``.
    """

    default_scorer = "reasoning_gym"

    def __init__(
        self,
        *,
        seed: int = 0,
        dataset: str,
        config: dict[str, Any] | None = None,
        train_size: int = 2000,
        held_out_size: int = 200,
        style: str = "chat",
        instruction: str = TAGGED,
    ) -> None:
        super().__init__(held_out_fraction=0.0, style=style, instruction=instruction)  # seeds divide the items, not their content
        self._dataset, self._config = dataset, dict(config or {})
        self._seeds = (seed * _SEED_STRIDE % _SEED_LIMIT, _HELD_OUT_SEED)
        self._sizes = (train_size, held_out_size)
        make_dataset(dataset, self._config, seed=0, size=1)  # refuses unknown names and knobs before a job starts

    def read_answer(self, text: str) -> str:
        """What votes among solutions: what the scorer judges unless it is told otherwise, the last ``<answer>`` block; '' for none."""
        from reasoner_ray.scoring.reasoning_gym import extract_answer  # scorers import the tasks

        return extract_answer(text) or ""

    def _make(self, *, held_out: bool) -> list[Item]:
        split, number = ("held_out", 1) if held_out else ("train", 0)
        items = self._items(split, self._seeds[number], self._sizes[number])
        reserved: set[str] = set() if held_out else {item.info["entry"]["question"] for item in self.held_out()}
        return [item for item in items if item.info["entry"]["question"] not in reserved]

    def _prompt(self, question: str) -> str | list[Message]:
        return build_prompt(question, style=self._style, instruction=self._instruction)

    def _items(self, split: str, seed: int, size: int) -> list[Item]:
        items = []
        for i, entry in enumerate(make_dataset(self._dataset, self._config, seed=seed, size=size)):
            info = {"dataset": self._dataset, "config": self._config, "entry": entry}
            items.append(Item(id=f"{self._dataset}-{split}-{i}", prompt=self._prompt(entry["question"]), answer=entry["answer"], info=info))
        return items


def make_dataset(name: str, config: dict[str, Any], *, seed: int, size: int) -> Any:
    """A reasoning-gym data set; raises ``ConfigError`` for a name or knob it does not take."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise EnvironmentProblem("the reasoning_gym task needs `pip install reasoning-gym`") from error
    if name not in DATASETS:
        raise ConfigError(f"task.args.dataset: reasoning-gym has no {name!r}; {suggest(name, sorted(DATASETS))}")
    try:
        return reasoning_gym.create_dataset(name, **{**config, "seed": seed, "size": size})
    except (TypeError, AssertionError, ValueError) as error:  # how its configs refuse what they do not take
        raise ConfigError(f"task.args.config: {name} refuses it: {error}") from error
