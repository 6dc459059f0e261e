"""Tasks made of recorded questions and answers: the shared base, and files of one's own (JSON lines, Parquet)."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

from reasoner_ray.data.records import Record, read_hub, read_records
from reasoner_ray.data.tasks import Item, Message, Task, is_held_out, register_task, stable_hash
from reasoner_ray.errors import ConfigError, DataError

log = logging.getLogger(__name__)

Style = Literal["chat", "text"]
T = TypeVar("T")
BOXED = "Reason step by step, and put your final answer within \\boxed{}."


def build_prompt(question: str, *, style: Style, instruction: str = "", shots: Sequence[tuple[str, str]] = ()) -> str | list[Message]:
    """A question behind solved examples (``shots``: question and answer): chat messages, or text to be continued.

    The examples come first and are the same for every question, so all prompts share that prefix.
    """
    if style == "text":
        examples = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shots)
        head = f"{instruction}\n\n" if instruction else ""
        return f"{head}{examples}Question: {question}\nAnswer:"
    tail = f"\n\n{instruction}" if instruction else ""
    messages: list[Message] = []
    for q, a in shots:
        messages += [{"role": "user", "content": q + tail}, {"role": "assistant", "content": a}]
    return [*messages, {"role": "user", "content": question + tail}]


def check_style(style: str) -> Style:
    """``style`` as given; raises ``ConfigError`` where it is neither chat nor text."""
    if style == "chat":
        return "chat"
    if style == "text":
        return "text"
    raise ConfigError(f"task.args.style: must be chat or text (got {style!r})")


def _told_apart(train: list[Item], held_out: list[Item]) -> tuple[list[Item], list[Item]]:
    """The two as they are; questions in both are a warning, for the user may mean it."""
    learnt = {repr(item.prompt) for item in train}
    both = [item.id for item in held_out if repr(item.prompt) in learnt]
    if both:
        log.warning(
            "%d of %d held-out questions are training questions as well, the first %s: figures on them say nothing about new ones",
            len(both),
            len(held_out),
            both[0],
        )
    return train, held_out


def _divide(things: Sequence[T], texts: Sequence[str], fraction: float, path: str) -> tuple[list[T], list[T]]:
    """What to train on and what is held out, by the hash of each one's text. Raises ``DataError`` where nothing is left to train on."""
    held_out = [is_held_out(text, fraction) for text in texts]
    train = [thing for thing, out in zip(things, held_out, strict=True) if not out]
    if not train:
        raise DataError(f"{path}: no record is left to train on with task.args.held_out_fraction={fraction}")
    return train, [thing for thing, out in zip(things, held_out, strict=True) if out]


def _read_where(where: Mapping[str, Any] | None) -> dict[str, list[Any]]:
    """``task.args.where`` as a list of values for each key. Raises ``ConfigError`` where it is anything else."""
    if where is None:
        return {}
    if not isinstance(where, Mapping):
        raise ConfigError(f"task.args.where: must name keys and their values, as in {{level: [Level 1, Level 2]}} (got {where!r})")
    wanted = {str(key): [*value] if isinstance(value, list | tuple) else [value] for key, value in where.items()}
    if empty := [key for key, values in wanted.items() if not values]:
        raise ConfigError(f"task.args.where.{empty[0]}: must name at least one value")
    return wanted


def _choose(records: list[Record], where: Mapping[str, list[Any]]) -> list[Record]:
    """The records whose keys have the values that ``where`` names; 1, "1" and true are three values.

    Raises ``DataError`` where none has, or none has such a key.
    """
    for key, wanted in where.items():
        texts = {json.dumps(value, default=str) for value in wanted}
        having = [r for r in records if key in r.values]
        chosen = [r for r in having if json.dumps(r.values[key], default=str) in texts]
        if records and not chosen:
            place, found = records[0].where, list(dict.fromkeys(f"{r.values[key]!r:.40}" for r in having))
            there = f"they have {', '.join(found[:8])}" if found else f"their keys are {', '.join(records[0].values)}"
            raise DataError(f"task.args.where: of {len(records)} records, the first at {place}, none has {key} in {wanted}; {there}")
        if len(having) < len(records):
            log.warning("task.args.where: %d of %d records have no %s and are left out", len(records) - len(having), len(records), key)
        records = chosen
    return records


class QuestionTask(Task):
    """Records from ``path`` and ``held_out_path``, else from the splits of a hub data set.

    With a ``path`` alone, records are divided by the hash of their question, ``held_out_fraction`` of them held out.
    Of the training records, the first ``shots`` that have a worked solution become the fixed examples of every prompt.
    ``where`` keeps the records, of both splits, whose keys have the values it names: ``{level: [Level 1, Level 2]}``.
    ``held_out_size`` keeps a fixed sample of the held-out records, chosen by the hash of their questions.
    """

    hub: str | None = None
    subset: str | None = None
    splits: tuple[str, str] = ("train", "test")

    def __init__(
        self,
        *,
        seed: int = 0,
        path: str | None = None,
        held_out_path: str | None = None,
        held_out_fraction: float = 0.05,
        held_out_size: int | None = None,
        where: Mapping[str, Any] | None = None,
        style: str = "chat",
        instruction: str = BOXED,
        shots: int = 0,
    ) -> None:
        del seed  # the order is the driver's business
        if path is None and (held_out_path is not None or self.hub is None):
            raise ConfigError("task.args.path: must be given")
        if held_out_size is not None and held_out_size < 1:
            raise ConfigError(f"task.args.held_out_size: must be at least 1 (got {held_out_size})")
        self._path, self._held_out_path, self._fraction = path, held_out_path, held_out_fraction
        self._held_out_size = held_out_size
        self._where = _read_where(where)
        self._style, self._instruction, self._n_shots = check_style(style), instruction, shots

    @abstractmethod
    def question(self, record: Record) -> str:
        """What is asked."""

    @abstractmethod
    def answer(self, record: Record) -> Any:
        """The reference answer."""

    @abstractmethod
    def worked(self, record: Record) -> str | None:
        """The answer as the policy should write it, for a solved example; None where the record has none."""

    def is_usable(self, record: Record) -> bool:
        """False for a record that the published set is known to have left without an answer; such are left out, and counted."""
        return True

    def info(self, record: Record) -> dict[str, Any]:
        """What else an item keeps of its record."""
        return {}

    def train(self) -> Sequence[Item]:
        """Raises ``DataError`` where the records cannot be read."""
        return self._splits[0]

    def held_out(self) -> Sequence[Item]:
        """Raises ``DataError`` where the records cannot be read."""
        return self._splits[1]

    @cached_property
    def _splits(self) -> tuple[list[Item], list[Item]]:
        train, held_out = (self._usable(_choose(records, self._where)) for records in self._records())
        examples = [r for r in train if self._n_shots and self.worked(r) is not None][: self._n_shots]
        if len(examples) < self._n_shots:
            raise ConfigError(f"task.args.shots: only {len(examples)} training records have a worked solution to show")
        shots = [(self.question(r), self.worked(r) or "") for r in examples]
        shown = {r.id for r in examples}
        return _told_apart(
            [self._item(r, shots) for r in train if r.id not in shown], [self._item(r, shots) for r in self._sample(held_out)]
        )

    def _sample(self, held_out: list[Record]) -> list[Record]:
        """Those with the smallest hashes, in their order; all of them where no size is asked for."""
        chosen = sorted(held_out, key=lambda r: stable_hash(self.question(r)))[: self._held_out_size]
        kept = {r.id for r in chosen}
        return [r for r in held_out if r.id in kept]

    def _usable(self, records: list[Record]) -> list[Record]:
        usable = [r for r in records if self.is_usable(r)]
        if len(usable) < len(records):
            first = next(r for r in records if not self.is_usable(r))
            log.warning(
                "%d of %d records have no answer and are left out, the first at %s", len(records) - len(usable), len(records), first.where
            )
        return usable

    def _records(self) -> tuple[list[Record], list[Record]]:
        if self._path is None:
            assert self.hub is not None  # checked by __init__
            return read_hub(self.hub, self.splits[0], self.subset), read_hub(self.hub, self.splits[1], self.subset)
        records = read_records(self._path)
        if self._held_out_path is not None:
            return records, read_records(self._held_out_path)
        return _divide(records, [self.question(r) for r in records], self._fraction, self._path)

    def _item(self, record: Record, shots: Sequence[tuple[str, str]]) -> Item:
        prompt = build_prompt(self.question(record), style=self._style, instruction=self._instruction, shots=shots)
        return Item(id=record.id, prompt=prompt, answer=self.answer(record), info=self.info(record))


@register_task("parquet")
@register_task("jsonl")
class FileTask(Task):
    """One's own records: ``prompt`` and ``answer`` name their keys; all other keys go into ``Item.info``.

    A prompt is a string (``style: text`` takes it as it is, ``style: chat`` as one user message, with ``instruction``
    added) or a list of chat messages.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        path: str,
        held_out_path: str | None = None,
        held_out_fraction: float = 0.1,
        prompt: str = "prompt",
        answer: str = "answer",
        style: str = "text",
        instruction: str = "",
    ) -> None:
        del seed  # the order is the driver's business
        self._path, self._held_out_path, self._fraction = path, held_out_path, held_out_fraction
        self._prompt_key, self._answer_key = prompt, answer
        self._style, self._instruction = check_style(style), instruction

    def train(self) -> Sequence[Item]:
        """Raises ``DataError`` where the records cannot be read."""
        return self._splits[0]

    def held_out(self) -> Sequence[Item]:
        """Raises ``DataError`` where the records cannot be read."""
        return self._splits[1]

    @cached_property
    def _splits(self) -> tuple[list[Item], list[Item]]:
        items = [self._item(r) for r in read_records(self._path)]
        if self._held_out_path is not None:
            return _told_apart(items, [self._item(r) for r in read_records(self._held_out_path)])
        return _divide(items, [str(item.prompt) for item in items], self._fraction, self._path)

    def _item(self, record: Record) -> Item:
        prompt, answer = record.get(self._prompt_key), record.get(self._answer_key)
        rest = {k: v for k, v in record.values.items() if k not in (self._prompt_key, self._answer_key)}
        return Item(id=record.id, prompt=self._prompt(record, prompt), answer=answer, info=rest)

    def _prompt(self, record: Record, prompt: Any) -> str | list[Message]:
        if isinstance(prompt, list):
            if not prompt or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt):
                raise DataError(f"{record.where}: {self._prompt_key!r} must be a string or a list of messages with role and content")
            return prompt
        text = record.text(self._prompt_key)
        if self._style == "text":
            return f"{self._instruction}{text}"
        return build_prompt(text, style="chat", instruction=self._instruction)
