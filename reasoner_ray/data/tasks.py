"""Tasks: where prompts and their reference answers come from, and in which order.

A ``Task`` is two lists of ``Item`` and a way to turn an item into token ids. Nothing here imports torch, Ray or
vLLM, so grader processes and the command line can load it quickly.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reasoner_ray.errors import CheckpointError, DataError
from reasoner_ray.registry import Registry, check_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.config import TaskConfig

Message = dict[str, str]
"""One chat message: ``{"role": ..., "content": ...}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One prompt with its reference answer. Picklable; ids are unique within a task."""

    id: str
    prompt: str | list[Message]  # raw text to be continued, or chat messages for the tokenizer's template
    answer: Any  # what the scorer compares with; its type is the scorer's business
    info: dict[str, Any] = field(default_factory=dict)  # what a verifier or an environment needs besides


class Task(ABC):
    """A set of items split into training and held-out ones.

    Subclasses take ``seed`` and their own keyword arguments (the job's ``task.args``), and must give the same
    items for the same arguments: a resumed run counts on it.
    """

    name: str = ""
    default_scorer: str = "exact_match"
    """What ``scoring.scorers: [{name: task}]`` stands for."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer: what ``rollout.stop`` should hold for this task."""
    control: str = ""
    """Text before every prompt (the job's ``task.control``)."""

    def check(self) -> None:  # noqa: B027 - most tasks have nothing to check
        """Find out what can be wrong before any actor starts. Raises ``ReasonerError``; the default finds nothing."""

    @abstractmethod
    def train(self) -> Sequence[Item]:
        """Items to learn from; raises ``DataError`` where they cannot be read."""

    @abstractmethod
    def held_out(self) -> Sequence[Item]:
        """Items for evaluation only, none of them in ``train()``."""

    def render(self, item: Item, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the prompt behind ``control``: raw text as it is, chat messages by the tokenizer's own template.

        Raises ``DataError`` where the prompt is a chat and the tokenizer has no chat template.
        """
        return with_control(render(item, tokenizer), self.control, tokenizer)


def with_control(tokens: Sequence[int], control: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``tokens`` of a context with the control text before them, after a token that begins a text."""
    first = int(bool(tokens) and tokens[0] == tokenizer.bos_token_id)
    return [*tokens[:first], *tokenizer.encode(control, add_special_tokens=False), *tokens[first:]] if control else list(tokens)


def render(item: Item, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of an item's prompt, as ``Task.render`` gives them. Raises ``DataError``."""
    if isinstance(item.prompt, str):
        return [int(t) for t in tokenizer.encode(item.prompt)]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"item {item.id} is a chat, but the tokenizer has no chat template; set task.args.style=text or use a chat model")
    text = tokenizer.apply_chat_template(item.prompt, add_generation_prompt=True, tokenize=False)
    # The template writes its own begin-of-text token; adding special tokens again would double it.
    return [int(t) for t in tokenizer.encode(str(text), add_special_tokens=False)]


TASKS: Registry[Callable[..., Task]] = Registry("task", "task.name")


def register_task(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: enter a task under ``name`` (for ``task.name`` in a job)."""

    def enter(cls: type[Task]) -> type[Task]:
        cls.name = name
        TASKS.register(name)(cls)
        return cls

    return enter


def check_task(config: TaskConfig) -> Callable[..., Task]:
    """What builds the task a job names; raises ``ConfigError`` for an unknown name or argument, with a suggestion."""
    factory = TASKS.get(config.name)
    check_arguments(factory, config.args, "task.args", reserved=("seed",))
    return factory


def get_task(config: TaskConfig, seed: int = 0) -> Task:
    """Build the task a job names: a registered one, or ``module:attribute`` (a ``Task`` class or a function that returns one).

    Raises ``ConfigError`` for an unknown name or argument; broken data raises ``DataError``, here or when first read.
    """
    task = check_task(config)(seed=seed, **config.args)
    if not task.name or config.name in TASKS.names():  # one class may be registered under several names
        task.name = config.name
    task.control = config.control
    return task


def check_lengths(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_context: int,
    max_new_tokens: int,
    items: Iterable[Item] | None = None,
) -> int:
    """Tokens of the longest prompt among ``items`` (default: all of the task's).

    Raises ``DataError`` naming the first item whose prompt leaves no room for ``max_new_tokens`` within ``max_context``.
    """
    room = max_context - max_new_tokens
    longest = 0
    for item in items if items is not None else [*task.train(), *task.held_out()]:
        length = len(task.render(item, tokenizer))
        if length > room:
            raise DataError(
                f"item {item.id} of task {task.name}: its prompt has {length} tokens, but rollout.max_context={max_context} less "
                f"rollout.max_new_tokens={max_new_tokens} leaves {room}; raise rollout.max_context or drop the item"
            )
        longest = max(longest, length)
    return longest


class DataOrder:
    """Training items in an endless order fixed by the seed: place ``i`` holds the same item in every run.

    Each epoch (``len(items)`` places) is a new shuffle drawn from (seed, epoch) and visits every item once. A run
    resumes exactly by going on at its next place; ``fingerprint`` tells whether the items are still the same.
    """

    def __init__(self, items: Sequence[Item], seed: int) -> None:
        if not items:
            raise DataError("the task has no training items")
        self._items = items
        self._seed = seed
        self._orders: dict[int, list[int]] = {}
        content = "\n".join(repr((item.id, item.prompt, item.answer)) for item in items)
        self.fingerprint = f"seed {seed}, {len(items)} items, sha256 {hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        """Items of an epoch."""
        return len(self._items)

    def __getitem__(self, place: int) -> Item:
        """The item at ``place`` (0, 1, ...; counts on through the epochs)."""
        if place < 0:
            raise IndexError(f"places count from 0 (got {place})")
        epoch, offset = divmod(place, len(self._items))
        return self._items[self._order(epoch)[offset]]

    def check(self, fingerprint: str) -> None:
        """Raises ``CheckpointError`` where a checkpoint was made with other items or another seed."""
        if fingerprint != self.fingerprint:
            raise CheckpointError(
                f"the checkpoint was made with other training data ({fingerprint}) than this job's ({self.fingerprint}); "
                "resume with the same task, task.args and seed (the run's own: reasoner train RUN/config.yaml --resume)"
            )

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self._items)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            # Groups of two neighbouring epochs may be asked for in turns; older ones never come back.
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return self._orders[epoch]


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process and on every machine (unlike ``hash``)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the item with this content belongs to the held-out split: decided by its content alone, never by its place."""
    return stable_hash(key) / 2**64 < fraction
