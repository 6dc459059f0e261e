"""Published labels become records with a label a step; a broken line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reasoner_ray.cli import app
from reasoner_ray.data.records import Record, read_records
from reasoner_ray.errors import ConfigError, DataError
from reasoner_ray.labels.converters import Options, convert, records_of


def converted(kind: str, values: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    return list(records_of(kind, Record("file, line 1", "r", values), Options(**options)))


def rated(*ratings: Any, chosen: int | None = 0, human: str | None = None) -> dict[str, Any]:
    completions = [{"text": f"{rating}/{i}", "rating": rating} for i, rating in enumerate(ratings)]
    return {
        "completions": completions,
        "chosen_completion": chosen,
        "human_completion": {"text": human, "rating": None, "source": "human"} if human else None,
    }


def prm800k(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"question": {"problem": "Why?"}, "label": {"steps": list(steps)}}


def test_prm800k_goes_on_from_what_was_chosen() -> None:
    values = prm800k(rated(1), rated(-1, -1, chosen=None, human="so"), rated(0, 1, chosen=1), rated(-1, chosen=None), rated(1))
    found = converted("prm800k", values)
    assert [(r["steps"], r["labels"]) for r in found] == [
        (["1/0", "-1/0"], [1, 0]),
        (["1/0", "-1/1"], [1, 0]),
        (["1/0", "so", "0/0"], [1, 1, 1]),
        (["1/0", "so", "1/1", "-1/0"], [1, 1, 1, 0]),  # nothing was chosen after it, so the solution ends
    ]
    assert [r["first_error"] for r in found] == [1, 1, None, 3]
    assert {r["question"] for r in found} == {"Why?"}
    assert [r["labels"] for r in converted("prm800k", values, neutral_is_bad=True)][2] == [1, 1, 0]
    once = [r["labels"] for r in converted("prm800k", values, once=True)]
    assert once == [[1, 0], [None, 0], [None, 1, 1], [None, None, 1, 0]], "every judgement counts once"


def test_the_folder_of_the_output_is_made(tmp_path: Path) -> None:
    source = tmp_path / "prm800k.jsonl"
    source.write_text(json.dumps(prm800k(rated(1))) + "\n")
    assert convert("prm800k", [source], tmp_path / "new" / "labels.jsonl", Options())["written"] == 1
    assert (tmp_path / "new" / "labels.jsonl").is_file()


def test_math_shepherd() -> None:
    good = {"label": "How many? Step 1: It is 2 + 3 = 5. +\nStep 2: So 6. The answer is: 6 -"}
    (record,) = converted("math-shepherd", good)
    assert record["question"] == "How many?"
    assert record["steps"] == ["It is 2 + 3 = 5.", "So 6. The answer is: 6"]
    assert (record["labels"], record["hard"], record["first_error"]) == ([1, 0], [True, False], 1)
    assert converted("math-shepherd", good, step_prefix=True)[0]["steps"][0] == "Step 1: It is 2 + 3 = 5."
    for label in ("no steps +", "Q Step 1: a Step 2: b +", "Q Step 1: a + Step 1: b +", "Q Step 1: + "):
        assert converted("math-shepherd", {"label": label}) == [], "left out, as its steps cannot be told apart"


def test_math_aps_prefixes_are_put_together_again() -> None:
    question = "What is one and one and one?"
    prefixes = {
        question: 0.5,
        f"{question}\n\nFirst one and one make two.": 0.75,
        f"{question}\n\nFirst one and one make two.\n\nThen three.": 1.0,
        f"{question}\n\nFirst one and one make two.\n\nThen four.": 0.25,
        f"{question}\n\nDie Lösung ist drei.": 1.0,
    }
    steps = [{"solution_prefix": k, "mc_value": v} for k, v in prefixes.items()]
    steps.append({"solution_prefix": f"{question}\n\nFirst one and one make two.\n\nThen four.", "mc_value": 0.0})
    found = converted("math-aps", {"question": question, "reasoning_steps": steps})
    assert [(r["steps"], r["soft"], r["hard"]) for r in found] == [
        (["First one and one make two.", "Then four."], [0.75, 0.125], [True, False]),
        (["First one and one make two.", "Then three."], [0.75, 1.0], [True, True]),
    ]
    assert [r["labels"] for r in converted("math-aps", {"question": question, "reasoning_steps": steps}, target="hard")] == [[1, 0], [1, 1]]


def test_math_aps_trees() -> None:
    def node(text: str, value: float, *children: dict[str, Any]) -> dict[str, Any]:
        return {"text": text, "mc_value": value, "children": list(children)}

    tree = node("Q?", 0.5, node("a", 0.5, node("b", 1.0), node("c", 0.0)), node("ü", 1.0, node("d", 1.0)), node("e", 1.0))
    found = converted("math-aps-tree", {"question": "Q?", "reasoning_steps": tree})
    assert [(r["steps"], r["soft"]) for r in found] == [(["a", "b"], [0.5, 1.0]), (["a", "c"], [0.5, 0.0]), (["e"], [1.0])]
    assert [r["hard"] for r in found] == [[False, True], [False, False], [True]], "right above one half, as OpenR has it"


def test_texts_that_begin_alike_are_no_steps_of_each_other() -> None:
    question = "What is one and eleven in numbers?"
    steps = [{"solution_prefix": f"{question}\n\nIt is {n}", "mc_value": v} for n, v in ((1, 0.0), (12, 1.0))]
    found = converted("math-aps", {"question": question, "reasoning_steps": steps})
    assert [(r["steps"], r["labels"]) for r in found] == [(["It is 1"], [0.0]), (["It is 12"], [1.0])]


def test_a_first_error_in_a_step_labelled_before_is_still_the_first() -> None:
    leaves = [{"text": text, "mc_value": 0.0, "children": []} for text in "bc"]
    tree = {"text": "Q?", "mc_value": 0.5, "children": [{"text": "a", "mc_value": 0.25, "children": leaves}]}
    found = converted("math-aps-tree", {"question": "Q?", "reasoning_steps": tree}, once=True)
    assert [(r["labels"], r["first_error"]) for r in found] == [([0.25, 0.0], 0), ([None, 0.0], 0)]


def test_long_solutions_and_bad_texts_end_without_a_stack() -> None:
    long = "Q " + " ".join(f"Step {i}: a +" for i in range(1, 3000))
    assert len(converted("math-shepherd", {"label": long})[0]["steps"]) == 2999
    deep: dict[str, Any] = {"text": "a", "mc_value": 1.0, "children": []}
    for _ in range(3000):
        deep = {"text": "a", "mc_value": 1.0, "children": [deep]}
    with pytest.raises(DataError, match=r"line 1: not a record of math-aps-tree \(RecursionError"):
        converted("math-aps-tree", {"question": "Q", "reasoning_steps": deep})
    nothing = {"completions": [{"text": None, "rating": 1}], "chosen_completion": 0}
    with pytest.raises(DataError, match=r"line 1: not a record of prm800k \(TypeError: a text is missing"):
        converted("prm800k", prm800k(nothing))


@pytest.mark.parametrize(
    ("kind", "file", "read", "written"),
    [
        ("prm800k", "prm800k_raw_samples.jsonl", 6, 36),
        ("math-shepherd", "math_shepherd_samples.jsonl", 7, 7),
        ("math-aps", "math_aps_samples.jsonl", 3, 121),
        ("math-aps", "math_aps_v2_samples.jsonl", 2, 86),
        ("math-aps-tree", "math_aps_v2_tree_samples.jsonl", 3, 242),
    ],
)
def test_published_samples(kind: str, file: str, read: int, written: int, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl"
    result = CliRunner().invoke(app, ["convert-labels", kind, str(data_dir / "prm/openr_samples" / file), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert f"{written} solutions of {read} records; 0 records left out" in result.stdout
    for record in read_records(out):
        steps, labels = record.get("steps"), record.get("labels")
        assert len(steps) == len(labels) > 0 and all(steps)
        assert not any(step in record.text("question") for step in steps if len(step) > 80), "the question is not part of a step"


def test_a_broken_line_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    good = json.dumps(prm800k(rated(1)))
    file, out = tmp_path / "raw.jsonl", tmp_path / "out.jsonl"
    for broken, message in (
        ('{"question"', "not valid JSON"),
        ('{"question": {"problem": "x"}}', r"not a record of prm800k \(KeyError: 'label'\)"),
    ):
        file.write_text(f"{good}\n{broken}\n")
        with pytest.raises(DataError, match=rf"raw\.jsonl, line 2: {message}"):
            convert("prm800k", [file], out, Options())
        assert not list(tmp_path.glob("out*"))
    with pytest.raises(DataError, match=r"line 1: not a record of math-aps \(ValueError: mc_value 7.0 is not in"):
        convert(
            "math-aps", [_write(file, {"question": "Q", "reasoning_steps": [{"solution_prefix": "Q a", "mc_value": 7}]})], out, Options()
        )
    with pytest.raises(ConfigError, match="unknown format 'prm80k'; did you mean 'prm800k'"):
        convert("prm80k", [file], out, Options())


def _write(file: Path, values: dict[str, Any]) -> Path:
    file.write_text(json.dumps(values) + "\n")
    return file
