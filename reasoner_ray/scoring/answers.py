"""Final answers: read from a solution's text, and grouped for votes by mathematical equality."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from reasoner_ray.data.math import last_boxed
from reasoner_ray.data.tasks import Item
from reasoner_ray.scoring.base import Answer, Score, Term
from reasoner_ray.scoring.graders import GraderPool

COMPARE_SECONDS = 5.0
"""How long comparing two answers may take before its process is killed; they then count as different."""
_ANSWER_IS = re.compile(r"(answer is:?|####)[ \t]*([^\n]+)", re.IGNORECASE)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_FORMULA = re.compile(r"\$([^$\n]*[^$\n\s=+*/<>-])\s*\$(?!\d)|\\\((.+?)\\\)")  # what a sum of money would be, "$20 + $15", is none
_PROSE = re.compile(r"(?:^|\s)[A-Za-z]{2,}(?:\s|$)")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_VALUE = re.compile(rf"(?<![\d)])-?{_NUMBER}(?:\s*[-+*/^]\s*\$?{_NUMBER})*%?|{_NUMBER}%?")
# A point before a capital ends a sentence, unless it is that of a title or an initial; a single capital is an answer of its own (B).
_SENTENCE_END = re.compile(r"(?:(?<![A-Z])|(?<=^[A-Z]))(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)\.(?=\s+[A-Z](?!\.))|[?!](?=\s+[A-Z])")


def final_answer(text: str) -> str:
    """A solution's answer; '' where it has none.

    Its last box, else its last ``<answer>`` block, else what follows the last ``answer is`` until its sentence ends, or the last
    ``####`` until its line does, else its last line.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    tagged = tagged_answer(text)
    if tagged is not None:
        return tagged
    said = _ANSWER_IS.findall(text)
    lines = text.strip().splitlines()
    last = lines[-1] if lines else ""
    if said:
        mark, last = said[-1]
        last = last if mark == "####" else _SENTENCE_END.split(last, maxsplit=1)[0]
    return last.strip().removesuffix(".").strip()


def final_value(text: str) -> str:
    """``final_answer``; where that is a sentence, the last formula (``$...$``, ``\\(...\\)``) or number in it, a sum counting as one.

    That is what math-verify judges of a text without a box, so answers in other words vote together.
    """
    answer = final_answer(text)
    if last_boxed(text) is not None or not _WORDS.search(_FORMULA.sub("", answer)):
        return answer
    formulas = [found for found in _FORMULA.finditer(answer) if not _PROSE.search("".join(filter(None, found.groups())))]
    numbers = [found for found in _VALUE.finditer(answer) if not any(f.start() < found.end() <= f.end() for f in formulas)]
    last = max([*formulas, *numbers], key=lambda found: found.end(), default=None)
    if last is None:
        return answer
    return ("".join(filter(None, last.groups())) if last in formulas else last.group()).strip()


def tagged_answer(text: str) -> str | None:
    """What the last ``<answer>`` block holds, trimmed; None where there is none."""
    blocks = _TAGGED.findall(text)
    return str(blocks[-1]).strip() if blocks else None


def group_answers(answers: Sequence[str], *, mathematical: bool = True) -> list[int]:
    """The group of each answer: equal ones share a number; groups count from 0 in the order in which they first come.

    Answers are equal where their texts are, white space aside, or, if ``mathematical``, where math-verify finds their values
    equal (``1/2``, ``0.5``, ``\\frac{1}{2}``). What cannot be read as mathematics, or takes longer than ``COMPARE_SECONDS``, is
    equal to the same text alone. Comparisons run in a process of their own, started by the first call that needs one; it blocks,
    so coroutines call it in a thread. Raises ``EnvironmentProblem`` where math-verify is not installed.
    """
    texts = [" ".join(answer.split()) for answer in answers]
    group_of: dict[str, int] = {}
    readable: dict[int, str] = {}  # one text of each group that can be compared
    for text in dict.fromkeys(texts):
        group = _group_of(text, readable) if mathematical and text else None
        if group is None:
            group = len(set(group_of.values()))
            if mathematical and text and len(set(texts)) > 1 and _is_readable(text):
                readable[group] = text
        group_of[text] = group
    return [group_of[text] for text in texts]


def _group_of(text: str, readable: dict[int, str]) -> int | None:
    """The group whose answer equals ``text``; None where there is none, or where the comparison fails."""
    for group, other in readable.items():
        score = _compare(other, text)
        if score.status != "ok":  # one that hangs with this one will hang with the next
            return None
        if score.value == 1.0:
            return group
    return None


@lru_cache(maxsize=65_536)
def _is_readable(text: str) -> bool:
    """Whether math-verify finds it equal to itself in time."""
    score = _compare(text, text)
    return score.status == "ok" and score.value == 1.0


@lru_cache(maxsize=65_536)
def _compare(reference: str, text: str) -> Score:
    return _pool().submit(Answer(text=f"\\boxed{{{text}}}"), Item(id="answer", prompt="", answer=f"\\boxed{{{reference}}}")).result()


@lru_cache(maxsize=1)
def _pool() -> GraderPool:
    return GraderPool([Term("math")], timeout_s=COMPARE_SECONDS)
