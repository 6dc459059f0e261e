"""What a task's own check says of steps. It judges lines, so its word counts only for steps that end where a line does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_LINE = re.compile(r"\S(?:[^\n]*\S)?")


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of a solution's text that say something, without the white space around them, and where they end."""

    texts: tuple[str, ...]
    ends: tuple[int, ...]  # characters

    @classmethod
    def of(cls, steps: Sequence[str], *, whole: bool) -> Lines:
        """Of the texts of all ``steps``. Unless the solution is ``whole``, a last line without a line break is not yet one."""
        text = "".join(steps)
        found = list(_LINE.finditer(text))
        if found and not whole and "\n" not in text[found[-1].end() :]:
            found.pop()
        return cls(tuple(match.group() for match in found), tuple(match.end() for match in found))


def labels_of_steps(steps: Sequence[str], lines: Lines, right: Sequence[bool]) -> list[bool | None]:
    """Whether each step is right, from whether each line is: all lines that end in it are.

    None for a step that ends inside a line, and for one in which no line ends: of these the check says nothing. Raises ``ValueError``
    where ``right`` has not an entry a line.
    """
    known = dict(zip(lines.ends, right, strict=True))
    labels: list[bool | None] = []
    text, seen = "", 0
    for step in steps:
        text += step
        end = len(text.rstrip())
        inside = [known[place] for place in lines.ends if seen < place <= end]
        labels.append(all(inside) if inside and end in known else None)
        seen = max(seen, end)
    return labels
