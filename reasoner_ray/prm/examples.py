"""From records to what supervised training learns.

A record is text or tokens; keys in brackets may be missing:

    {"prompt": text or chat, "answer": text, ["reward": 1]}                   kind sft (``solution`` or ``steps`` will do, too)
    {"prompt": text or chat, "steps": [text, ...], "labels": [0.25, 1, null]}  kind prm; a step labelled null is not learnt
    {"prompt": text or chat, "steps": [text, ...], "reward": 1}               kind value
    {"tokens": [...], "start": tokens of the prompt, ["ends": [...]], ...}    any kind: the steps' ends in place of texts

What `reasoner label` and its converters write are such records. One whose labels (or reward) are all null is left out and
counted, and so is one with a low reward where a policy would learn it.

``question`` stands for ``prompt``, ``+``, ``-``, true and false for labels. Text is encoded a step at a time, so that the
ends of the steps are exact whatever the text holds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reasoner_ray.data.records import Record, read_records
from reasoner_ray.data.tasks import Item, Task, is_held_out, render
from reasoner_ray.errors import DataError
from reasoner_ray.prm.judge import Asked, Asker
from reasoner_ray.prm.readings import imitate, read_at
from reasoner_ray.steps import Partial
from reasoner_ray.tokens import continuation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.prm.settings import SupervisedConfig
    from reasoner_ray.trajectory import Trajectory

Kind = Literal["sft", "prm", "value"]
_MARKS = {"+": 1.0, "-": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One solution to learn from."""

    id: str
    where: str  # opens every error text about it
    partial: Partial
    labels: tuple[float | None, ...] = ()  # one a step, in [0, 1]; None: not known
    reward: float | None = None
    unknown: bool = False  # its record has a place for what is to be learnt, and nothing in it
    asked: Asked | None = None  # how a judge is asked about it, where one is taught

    def unfit(self, kind: Kind, settings: SupervisedConfig) -> str | None:
        """Why this solution is left out; None where it is learnt."""
        if max(len(self.partial.tokens), self.asked.longest if self.asked else 0) > settings.max_tokens:
            return f"longer than supervised.max_tokens={settings.max_tokens}"
        if kind == "sft" and settings.learn_above is None:
            return None
        if self.unknown:
            return "without a single label" if kind == "prm" else "without a reward"
        if kind == "sft" and self.reward is not None and settings.learn_above is not None and self.reward <= settings.learn_above:
            return f"whose reward is not above supervised.learn_above={settings.learn_above:g}"
        return None

    def trajectory(self, kind: Kind, settings: SupervisedConfig) -> Trajectory:
        """What the learner trains on. Raises ``DataError`` where the record lacks what ``kind`` learns."""
        partial = self.partial
        if kind == "sft":
            return imitate(partial, name=self.id)
        if kind == "prm":
            known = [(step, label) for step, label in enumerate(self.labels) if label is not None]
            if not known:
                raise DataError(f"{self.where}: no step has a label; kind prm needs `labels`, one a step")
            targets = [target_of(label, settings) for _, label in known]
            if self.asked is not None:
                return self.asked.trajectory([step for step, _ in known], targets, name=self.id)
            return read_at(partial.tokens, [partial.ends[step] for step, _ in known], targets, name=self.id)
        if self.reward is None:
            raise DataError(f"{self.where}: no `reward`; kind value needs the reward of the whole solution")
        targets = value_targets(self.reward, len(partial.ends), settings.gamma)
        return read_at(partial.tokens, [partial.start, *partial.ends], targets, name=self.id)


def target_of(label: float, settings: SupervisedConfig) -> float:
    """What a step's label is learnt as: itself, or under hard labels 0 or 1."""
    return label if settings.labels == "soft" else float(label > settings.hard_above)


def value_targets(reward: float, steps: int, gamma: float) -> list[float]:
    """The return from the question's end, from each step's end but the last, and the reward itself at the answer's end.

    The reward is earned by the last step, so the state before it is worth all of it.
    """
    return [reward * gamma ** max(steps - 1 - done, 0) for done in range(steps + 1)]


def read_examples(
    names: Sequence[str], kind: Kind, settings: SupervisedConfig, tokenizer: PreTrainedTokenizerBase, task: Task | None = None
) -> tuple[list[Example], Counter[str]]:
    """The examples of ``names`` (files, or ``task``), and how many were left out, by the reason.

    Raises ``DataError`` naming the record that is broken or lacks what ``kind`` learns.
    """
    kept: list[Example] = []
    left_out: Counter[str] = Counter()
    asker = Asker(settings, tokenizer) if settings.head == "judge" else None
    for name in names:
        if name == "task":
            found: Iterable[Example] = (_of_item(item, settings, tokenizer) for item in (task.train() if task else ()))
        else:
            found = (example_of(record, kind, settings, tokenizer, str(Path(name).name)) for record in read_records(name))
        for each in found:
            example = each if asker is None else replace(each, asked=asker.ask(each.partial))
            reason = example.unfit(kind, settings)
            if reason is not None:
                left_out[reason] += 1
                continue
            example.trajectory(kind, settings)  # whatever is wrong with it shows before anything starts
            kept.append(example)
    if not kept:
        reasons = "; ".join(f"{n} {reason}" for reason, n in left_out.items()) or "there is none"
        raise DataError(f"supervised: no solution of {', '.join(names)} can be learnt from: {reasons}")
    return kept, left_out


def split(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Examples to learn from and held-out ones: a question is on one side with all its solutions, decided by its tokens alone."""
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[is_held_out(",".join(map(str, example.partial.prompt)), fraction)].append(example)
    return sides


def example_of(record: Record, kind: Kind, settings: SupervisedConfig, tokenizer: PreTrainedTokenizerBase, source: str = "") -> Example:
    """A record as an example. Raises ``DataError``."""
    values = record.values
    partial = _of_tokens(record, kind) if "tokens" in values else _of_text(record, kind, settings, tokenizer)
    given = values.get("labels") or ()
    if not isinstance(given, list | tuple | str):
        raise DataError(f"{record.where}: 'labels' must be a list, one a step (got {given!r:.80})")
    labels = tuple(_read_label(record, label) for label in given)
    if labels and len(labels) != len(partial.ends):
        raise DataError(f"{record.where}: {len(labels)} labels for {len(partial.ends)} steps; a record needs one label a step (or null)")
    reward = values.get("reward")
    if reward is not None and not (isinstance(reward, int | float) and math.isfinite(reward)):
        raise DataError(f"{record.where}: 'reward' must be a finite number (got {reward!r:.80})")
    return Example(
        id=f"{source}/{record.id}",
        where=record.where,
        partial=partial,
        labels=labels,
        reward=None if reward is None else float(reward),
        unknown=(labels != () and all(label is None for label in labels)) if kind == "prm" else "reward" in values and reward is None,
    )


def encode_steps(prompt: Sequence[int], steps: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, end_of_text: bool) -> Partial:
    """``steps`` after ``prompt``, each encoded by itself; an end-of-text token belongs to the last. Raises ``ValueError``."""
    pieces = [list(continuation(tokenizer, step)) for step in steps]
    if end_of_text and pieces:
        pieces[-1].append(int(tokenizer.eos_token_id))
    partial = Partial.root(prompt)
    for piece in pieces:
        partial = partial.then(piece)
    return partial


def render_prompt(prompt: Any, chat: bool, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Token ids of a record's prompt: a text, a text as the user's message, or messages. Raises ``DataError``."""
    if isinstance(prompt, str) and chat:
        prompt = [{"role": "user", "content": prompt}]
    if not (isinstance(prompt, str) and prompt) and not (isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt) and prompt):
        raise DataError(f"{where}: the prompt must be a text or a list of messages (got {prompt!r:.80})")
    return render(Item(id=where, prompt=prompt, answer=None), tokenizer)


def _of_text(record: Record, kind: Kind, settings: SupervisedConfig, tokenizer: PreTrainedTokenizerBase) -> Partial:
    values = record.values
    prompt = render_prompt(record.get("prompt" if "prompt" in values else "question"), settings.chat, tokenizer, record.where)
    if kind == "sft" and "steps" not in values:
        steps = [record.text("answer" if "answer" in values else "solution")]
    else:
        steps = record.get("steps")
        if not (isinstance(steps, list) and steps and all(isinstance(s, str) and s for s in steps)):
            raise DataError(f"{record.where}: 'steps' must be a list of non-empty texts (got {steps!r:.80})")
        steps = [step + settings.separator for step in steps[:-1]] + [steps[-1]]
    return encode_steps(prompt, steps, tokenizer, end_of_text=settings.end_of_text)


def _of_tokens(record: Record, kind: Kind) -> Partial:
    tokens, start = record.get("tokens"), record.get("start")
    try:
        ends = [len(tokens)] if kind == "sft" and record.values.get("ends") is None else record.get("ends")
        partial = Partial(tuple(map(int, tokens)), tuple(map(int, ends)), int(start))
        if partial.start < 1 or not 0 <= min(partial.tokens) <= max(partial.tokens) < 1 << 31:
            raise ValueError("a prompt has at least one token, and a token is a number from 0 to 2^31 - 1")
        return partial
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{record.where}: {error}; a record of tokens needs `tokens`, `start` (tokens of the prompt) and, for kinds prm and value, "
            "`ends` (one past each step's last token)"
        ) from error


def _of_item(item: Item, settings: SupervisedConfig, tokenizer: PreTrainedTokenizerBase) -> Example:
    solution = item.info.get("solution")
    if not isinstance(solution, str) or not solution:
        raise DataError(f"item {item.id} has no info['solution'] to learn; name files in supervised.data, or take a task with solutions")
    partial = encode_steps(render(item, tokenizer), [solution], tokenizer, end_of_text=settings.end_of_text)
    return Example(id=f"task/{item.id}", where=f"item {item.id}", partial=partial)


def _read_label(record: Record, label: Any) -> float | None:
    if label is None:
        return None
    value = _MARKS.get(label) if isinstance(label, str) else label
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DataError(f"{record.where}: a label must be in [0, 1], '+', '-', true, false or null (got {label!r:.80})")
    return float(value)
