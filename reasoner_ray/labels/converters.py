"""Published process labels as records that ``kind: prm`` trains on: PRM800K, Math-Shepherd, MATH-APS (flat and as a tree).

    {"question": text, "steps": [text, ...], "labels": [...], "soft": [...], "hard": [...], "first_error": n}

The rules are those of OpenR's preprocessing (arXiv:2410.09671), but for two: alternatives of a step branch off the solution that
went on, instead of being multiplied with all alternatives of all other steps; and prefixes of MATH-APS that continue one another are
put together again, with the mean of their values where one was estimated several times.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from reasoner_ray.data.records import Record, read_records
from reasoner_ray.errors import ConfigError, DataError
from reasoner_ray.labels.records import Target
from reasoner_ray.registry import suggest

HARD_ABOVE = 0.5
"""MATH-APS: a step is right where more than this share of its completions was."""
SHORTEST = 6
"""MATH-APS: words that a prefix must have."""
_STEP_MARK = re.compile(r"Step \d*: ?")


@dataclass(slots=True, eq=False)
class Step:
    """A step in a tree of solutions; its value is the share of right completions, or 0 or 1 by a person's judgement."""

    text: str
    values: list[float]
    children: list[Step] = field(default_factory=list)
    told: bool = False  # whether a record has its label


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to convert."""

    target: Target = "soft"
    once: bool = False  # a step that several solutions share is labelled in the first of them alone
    neutral_is_bad: bool = False  # PRM800K: rating 0
    step_prefix: bool = False  # write ``Step 1: `` before each step


@dataclass(frozen=True, slots=True)
class Tree:
    """The solutions of one question. ``hard_above``: a step of a higher value is right."""

    question: str
    roots: list[Step]
    hard_above: float = 0.0


def convert(kind: str, files: Sequence[Path], out: Path, options: Options) -> dict[str, int]:
    """Convert ``files`` into ``out`` (JSON lines) and return how many records were read, left out and written.

    Raises ``DataError`` naming the file and line that is broken, ``ConfigError`` for an unknown kind; ``out`` is then not written.
    """
    if kind not in CONVERTERS:
        raise ConfigError(f"unknown format {kind!r}; {suggest(kind, sorted(CONVERTERS))}")
    counts: Counter[str] = Counter(read=0, left_out=0, written=0)
    aside = out.with_name(f"{out.name}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with aside.open("w", encoding="utf-8") as target:
            for file in files:
                for record in read_records(file):
                    written = [*records_of(kind, record, options)]
                    counts.update(read=1, left_out=not written, written=len(written))
                    target.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in written)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return dict(counts)


def records_of(kind: str, record: Record, options: Options) -> Iterator[dict[str, Any]]:
    """The solutions of one record; none where its labels are of no use. Raises ``DataError``."""
    try:
        tree = CONVERTERS[kind](record, options)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{record.where}: not a record of {kind} ({type(error).__name__}: {error})") from error
    if tree is None:
        return
    for number, path in enumerate(_paths(tree.roots)):
        means = [fmean(step.values) for step in path]
        values = [None if step.told and options.once else mean for step, mean in zip(path, means, strict=True)]
        for step in path:
            step.told = True
        hard = [None if value is None else value > tree.hard_above for value in values]
        labels = values if options.target == "soft" else [None if label is None else float(label) for label in hard]
        if any(label is not None for label in labels):
            texts = [f"Step {i}: {s.text}" if options.step_prefix else s.text for i, s in enumerate(path, start=1)]
            yield {
                "id": f"{record.id}/{number}",
                "source": kind,
                "question": tree.question,
                "steps": texts,
                "labels": labels,
                "soft": values,
                "hard": hard,
                "first_error": next((i for i, mean in enumerate(means) if mean <= tree.hard_above), None),
            }


def _paths(roots: Sequence[Step]) -> Iterator[tuple[Step, ...]]:
    """Every way from a root to a leaf."""
    open_paths: list[tuple[Step, ...]] = [(root,) for root in reversed(roots)]
    while open_paths:
        path = open_paths.pop()
        if path[-1].children:
            open_paths += [(*path, child) for child in reversed(path[-1].children)]
        else:
            yield path


def _prm800k(record: Record, options: Options) -> Tree:
    """A person's ratings 1, 0 and -1; the solution goes on from the chosen completion, or from the one a person wrote."""
    bad = {-1, 0} if options.neutral_is_bad else {-1}
    roots: list[Step] = []
    level = roots
    for step in record.values["label"]["steps"]:
        completions, human = step.get("completions") or [], step.get("human_completion")
        made = [Step(_string(c["text"]), [float(c["rating"] not in bad)]) for c in completions]
        chosen = step.get("chosen_completion")
        if chosen is None and human:
            made.append(Step(_string(human["text"]), [float(human.get("rating") not in bad)]))
            chosen = len(made) - 1
        level.extend(made)
        if chosen is None:
            break
        level = made[chosen].children
    return Tree(_text(record.values["question"]["problem"]), roots)


def _math_shepherd(record: Record, options: Options) -> Tree | None:
    """``Step 1: ... +`` to ``Step n: ... -``; left out where the steps cannot be told apart or one has no label."""
    text = _text(record.values["label"])
    question, mark, solution = text.partition("Step 1: ")
    if not mark or "Step 1: " in solution:
        return None
    parts = [part.strip() for part in _STEP_MARK.split(solution)]
    if any(part[-1:] not in ("+", "-") or not part[:-1].strip() for part in parts):
        return None
    return Tree(question.strip(), [_chain([Step(part[:-1].strip(), [float(part[-1] == "+")]) for part in parts])])


def _math_aps(record: Record, options: Options) -> Tree | None:
    """Prefixes, question included, with their MC values."""
    question = _text(record.values["question"])
    values: dict[str, list[float]] = {}
    for prefix in record.values["reasoning_steps"]:
        text, value = _text(prefix["solution_prefix"]), float(prefix["mc_value"])
        if not 0 <= value <= 1:
            raise ValueError(f"mc_value {value} is not in [0, 1]")
        if len(text.split()) >= SHORTEST and text.isascii():
            values.setdefault(text, []).append(value)
    roots: list[Step] = []
    above: list[tuple[str, Step]] = []  # the prefixes of the one at hand, shortest first
    for text in sorted(values):  # a prefix comes right before what continues it
        while above and not _goes_on(text, above[-1][0]):
            above.pop()
        known = above[-1][0] if above else question
        if not text.startswith(known):
            raise ValueError("a solution_prefix does not begin with the question")
        own = text[len(known) :].strip()
        if own:  # else it is the question itself
            step = Step(own, values[text])
            (above[-1][1].children if above else roots).append(step)
            above.append((text, step))
    return Tree(question.strip(), roots, HARD_ABOVE)


def _goes_on(text: str, prefix: str) -> bool:
    """Whether ``text`` is ``prefix`` and further steps, not just a text that begins alike (1 and 12)."""
    return text.startswith(prefix) and (prefix[-1].isspace() or text[len(prefix)].isspace())


def _math_aps_tree(record: Record, options: Options) -> Tree | None:
    """Nested ``text``, ``mc_value``, ``children``; the root is the question."""
    root = record.values["reasoning_steps"]
    return Tree(_text(root["text"]).strip(), [s for child in root["children"] for s in _aps_steps(child)], HARD_ABOVE)


def _aps_steps(node: dict[str, Any]) -> list[Step]:
    """A node as a step; one whose text is of no use is left out with what follows it."""
    text, value = _text(node["text"]).strip(), float(node["mc_value"])
    if not 0 <= value <= 1:
        raise ValueError(f"mc_value {value} is not in [0, 1]")
    children = [step for child in node["children"] for step in _aps_steps(child)]
    return [Step(text, [value], children)] if text and text.isascii() else []


def _chain(steps: list[Step]) -> Step:
    for step, following in pairwise(steps):
        step.children.append(following)
    return steps[0]


def _text(value: Any) -> str:
    if not _string(value).strip():
        raise ValueError(f"a text is missing (got {value!r:.60})")
    return str(value)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is missing (got {value!r:.60})")
    return value


CONVERTERS: dict[str, Callable[[Record, Options], Tree | None]] = {
    "prm800k": _prm800k,
    "math-shepherd": _math_shepherd,
    "math-aps": _math_aps,
    "math-aps-tree": _math_aps_tree,
}
