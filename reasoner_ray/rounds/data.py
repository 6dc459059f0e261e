"""What a round learns from: the paths that searches found, as records of ``kind: sft`` and ``kind: value``. Plain data, no Ray."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from reasoner_ray.errors import DataError
from reasoner_ray.search.results import read_results


def gather(
    sources: Sequence[Path], target: Path, kind: Literal["sft", "value"], *, right_from: float, keep: int | None
) -> dict[str, float]:
    """Write to ``target`` what ``kind`` learns from the results of searches, the newest file first, and return counts.

    sft: right paths alone. value: right and wrong ones. Raises ``DataError`` where there is none, or a results file is broken.
    """
    searches = [record for source in sources for record in read_results(source)]
    records = right_paths(searches, right_from, keep) if kind == "sft" else judged_paths(searches)
    if not records:
        newest = len(read_results(sources[0]))
        raise DataError(
            f"no search of {newest} training questions found a {'right' if kind == 'sft' else 'judged'} path ({sources[0]}), so there is "
            "nothing to learn from: begin with a policy that was fine-tuned for longer, search more widely (search.settings), or on more "
            "questions (rounds.questions)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in records))
    aside.replace(target)
    return {"paths": float(len(records)), "questions": float(len({record["question"] for record in records}))}


def right_paths(searches: Sequence[dict[str, Any]], right_from: float, keep: int | None) -> list[dict[str, Any]]:
    """Paths whose answer is right, each text of a question once, ``keep`` a question at most, in the order of ``searches``.

    A wrong path is never among them, and neither is one that could not be judged: imitating all that a search finds teaches its errors.
    """
    kept: list[dict[str, Any]] = []
    number: Counter[str] = Counter()
    for record in _different(searches):
        if record["reward"] >= right_from and (keep is None or number[record["question"]] < keep):
            number[record["question"]] += 1
            kept.append(record)
    return kept


def judged_paths(searches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All paths that were judged, right and wrong, each text of a question once."""
    return list(_different(searches))


def _different(searches: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Raises ``DataError`` for a path without its tokens."""
    seen: set[tuple[str, str]] = set()
    for search in searches:
        for solution in search["solutions"]:
            key = (str(search["id"]), solution["text"].strip())
            if solution["correct"] is not None and key not in seen:
                seen.add(key)
                if "path" not in solution:
                    raise DataError(
                        f"a search of {search['id']} has no tokens to learn from: search.save_tokens must be true in this phase"
                    )
                yield {"id": f"{search['id']}#{len(seen)}", "question": search["id"], "reward": solution["correct"], **solution["path"]}
