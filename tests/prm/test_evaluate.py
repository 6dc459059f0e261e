"""`reasoner eval` of step models: ProcessBench's own files, held-out labels, and broken input."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from reasoner_ray.errors import DataError
from reasoner_ray.prm.evaluate import evaluate_model, held_out_examples, read_processbench
from reasoner_ray.prm.settings import SupervisedConfig
from reasoner_ray.steps import Partial
from tests.prm.conftest import SLIP, make_examples, write_examples

SETTINGS = SupervisedConfig(max_tokens=100_000)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


class Says:
    """A pool whose scores a function of the solution gives."""

    def __init__(self, function: Callable[[Partial], list[float]]) -> None:
        self._function = function

    async def score(self, partials: Sequence[Partial]) -> tuple[list[list[float]], int]:
        return [self._function(p) for p in partials], sum(len(p.tokens) for p in partials)


def test_processbench_as_it_is(data_dir: Path, tokenizer: Any) -> None:
    """400 solutions of GSM8K, 193 of them right; one who knows the truth gets F1 1, one who never objects 0."""
    file = data_dir / "prm" / "processbench" / "gsm8k.json"
    if not file.is_file():
        pytest.skip(f"no ProcessBench at {file}")
    bench = read_processbench(str(file), SETTINGS, tokenizer)
    judged, left_out = bench
    assert (len(judged), left_out, sum(j.first_error < 0 for j in judged)) == (400, 0, 193)
    truth = {j.partial: j.first_error for j in judged}

    def knows(partial: Partial) -> list[float]:
        return [0.2 if i == truth[partial] else 0.9 for i in range(len(partial.ends))]

    cases: dict[str, tuple[Callable[[Partial], list[float]], float, float]] = {
        "knows": (knows, 1.0, 1.0),
        "never objects": (lambda p: [0.9] * len(p.ends), 0.0, 1.0),
        "always objects": (lambda p: [0.1] * len(p.ends), sum(t == 0 for t in truth.values()) / 207, 0.0),
    }
    for function, on_wrong, on_right in cases.values():
        figures = asyncio.run(evaluate_model(Says(function), "prm", SETTINGS, [], {"gsm8k": bench}))
        assert figures["gsm8k/accuracy_on_erroneous"] == pytest.approx(on_wrong)
        assert figures["gsm8k/accuracy_on_correct"] == on_right
        assert figures["gsm8k/f1"] == (1.0 if function is knows else 0.0)
        assert (figures["gsm8k/erroneous"], figures["gsm8k/correct"], figures["gsm8k/left_out"]) == (207, 193, 0)
        assert figures["gsm8k/tokens"] == sum(len(p.tokens) for p in truth)
    strict = SETTINGS.model_copy(update={"threshold": 0.1})
    assert asyncio.run(evaluate_model(Says(knows), "prm", strict, [], {"g": bench}))["g/accuracy_on_erroneous"] == 0


def test_held_out_labels(tmp_path: Path, tokenizer: Any) -> None:
    data = write_examples(tmp_path / "a.jsonl", make_examples(40))
    settings = SETTINGS.model_copy(update={"data": (str(data),), "held_out_fraction": 0.5})
    for kind in ("prm", "value"):
        examples = held_out_examples(settings, kind, tokenizer)
        assert 10 < len(examples) < 30

        def sees(partial: Partial) -> list[float]:
            return [0.0 if SLIP in partial.tokens[:end] else 1.0 for end in partial.ends]

        figures = asyncio.run(evaluate_model(Says(sees), kind, settings, examples, {}))
        assert figures["eval/auc"] == 1.0 if kind == "prm" else figures["eval/auc"] > 0.5
        assert figures["eval/steps" if kind == "prm" else "eval/states"] == sum(len(e.partial.ends) for e in examples)
    assert held_out_examples(SETTINGS, "prm", tokenizer) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "is not a readable JSON array"),
        ("{}", "must hold a JSON array of records"),
        ([{"problem": "p", "steps": ["a"], "label": 1}], "record 0: 'label' must be the index of one of 1 steps, or -1"),
        ([{"problem": "p", "steps": [], "label": -1}], "record 0: 'steps' must be a list"),
        ([{"problem": "p", "steps": ["a"], "label": -1}, {"steps": ["a"], "label": -1}], "record 1: no value for 'problem'"),
    ],
)
def test_broken_files_are_named(content: Any, message: str, tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "bench.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=rf"bench\.json.*{message}"):
        read_processbench(str(file), SETTINGS, tokenizer)
    with pytest.raises(DataError, match="no data file"):
        read_processbench(str(tmp_path / "none.json"), SETTINGS, tokenizer)
    (tmp_path / "long.json").write_text(json.dumps([{"problem": "p " * 99, "steps": ["a"], "label": -1}]))
    with pytest.raises(DataError, match=r"no solution has at most supervised\.max_tokens=4 tokens"):
        read_processbench(str(tmp_path / "long.json"), SETTINGS.model_copy(update={"max_tokens": 4}), tokenizer)
