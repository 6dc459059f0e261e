"""Labelling inside a rollout worker: the job's settings, token spans, graders in processes of their own."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reasoner_ray.config import JobConfig, load_config, parse_config
from reasoner_ray.data.tasks import get_task
from reasoner_ray.errors import ConfigError
from reasoner_ray.labels.launch import choose_items, header_of
from reasoner_ray.labels.report import lines_of, summarise
from reasoner_ray.rollout.worker import RolloutWorker
from tests.labels.world import LineEngine


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def job(folder: Path, scorer: str = "all_good", **labels: Any) -> JobConfig:
    return parse_config(
        {
            "model": {"path": str(folder)},
            "task": {"name": "arithmetic", "args": {"digits": 1, "shots": 1}},
            "scoring": {"scorers": [{"name": f"tests.labels.scorers:{scorer}"}], "timeout_s": 0.3},
            "rollout": {"max_context": 256, "max_new_tokens": 60, "kv_cache_gb": 0.05, "episode": "label", "stop": ["never"]},
            "labels": labels,
        }
    )


def run(config: JobConfig, engine: LineEngine, tokenizer: Any, questions: int = 1) -> list[dict[str, Any]]:
    async def ask() -> list[dict[str, Any]]:
        worker = RolloutWorker(config, engine, tokenizer)
        items = get_task(config.task, config.seed).train()[:questions]
        try:
            answers = await asyncio.gather(*(worker.run_group(item, f"label-{item.id}", 1) for item in items))
        finally:
            worker.close()
        return [trajectory.info["labels"] for (trajectory,), _ in answers]

    return asyncio.run(ask())


@pytest.mark.parametrize(("method", "separator"), [("math_shepherd", "\n"), ("omega_prm", "\n"), ("omega_prm", {"before": "yes|no"})])
def test_a_question_is_labelled_with_token_spans(tiny_model_dir: Path, tokenizer: Any, method: str, separator: Any) -> None:
    """Steps by their separator or by the structure of the text: the same spans here."""
    engine = LineEngine(tokenizer, lines=4, error=0.25, seed=1)
    config = job(tiny_model_dir, method=method, completions=16, solutions=6, separator=separator)
    for record in run(config, engine, tokenizer, questions=3):
        assert record["status"] == "labelled" and len(record["solutions"]) > 2
        for solution in record["solutions"]:
            begins = [solution["start"], *solution["ends"][:-1]]
            spans = [solution["tokens"][a:b] for a, b in zip(begins, solution["ends"], strict=True)]
            texts = [tokenizer.decode(span, skip_special_tokens=True) for span in spans]
            assert texts == solution["steps"] and set(texts) <= {"yes\n", "no\n"} and len(texts) == 4
            assert solution["tokens"][-1] == tokenizer.eos_token_id, "the end-of-text token belongs to the last step"
            assert tokenizer.decode(solution["tokens"][: solution["start"]]) == record["prompt"]
            assert solution["first_error"] == (texts.index("no\n") if "no\n" in texts else None)
            assert solution["right"] is ("no\n" not in texts)
        cost = record["cost"]
        assert cost["requests"] == record["graded"] and cost["generated"] > 4 * cost["requests"] and cost["seconds"] > 0
    assert {call[1].stop for call in engine.calls} == {("never",)}, "a completion is a whole solution"
    assert {call[1].temperature for call in engine.calls} == {1.0}


def test_a_grader_that_hangs_is_killed_and_its_answer_is_counted_not_called_wrong(tiny_model_dir: Path, tokenizer: Any) -> None:
    config = job(tiny_model_dir, "hang_on_bad", method="math_shepherd", completions=1, solutions=3)
    (record,) = run(config, LineEngine(tokenizer, lines=2, error=0.4, seed=1), tokenizer)
    hung = record["grader_failures"]
    assert 0 < hung < record["graded"]
    values = [value for solution in record["solutions"] for value in solution["soft"]]
    assert sum(value is None for value in values) == hung and set(values) == {None, 1.0}


def checked(folder: Path, task: dict[str, Any], scorer: str = "all_good", **labels: Any) -> JobConfig:
    tree = job(folder, scorer, **labels).model_dump(mode="json")
    return parse_config({**tree, "task": {"name": "tests.labels.tasks:Checked", "args": task}})


def test_labels_are_measured_by_the_tasks_own_check_where_steps_are_lines(tiny_model_dir: Path, tokenizer: Any) -> None:
    config = checked(tiny_model_dir, {}, method="math_shepherd", completions=16, solutions=6)
    (record,) = run(config, LineEngine(tokenizer, lines=3, error=0.3, seed=2), tokenizer)
    assert record["check_failures"] == {}
    for solution in record["solutions"]:
        assert solution["exact"] == ["no" not in step for step in solution["steps"]]
    report = summarise([record])
    assert report["checked"] == report["labels"] and 0.5 < report["agreement"] <= 1


def test_steps_that_are_no_lines_are_measured_where_a_line_ends(tiny_model_dir: Path, tokenizer: Any) -> None:
    """A step of one token is no line: told so, a check of lines would call each of them wrong."""
    config = checked(tiny_model_dir, {}, method="math_shepherd", completions=2, solutions=3, separator=1)
    (record,) = run(config, LineEngine(tokenizer, lines=3, error=0.0, seed=2), tokenizer)
    for solution in record["solutions"]:
        said = [label for label in solution["exact"] if label is not None]
        assert said == [True] * 3 and len(solution["exact"]) > 3
    assert summarise([record])["agreement"] == 1.0


def test_a_check_of_steps_that_hangs_is_killed_and_counted(tiny_model_dir: Path, tokenizer: Any) -> None:
    config = checked(tiny_model_dir, {"hang": "no"}, method="math_shepherd", completions=1, solutions=4)
    (record,) = run(config, LineEngine(tokenizer, lines=2, error=0.4, seed=1), tokenizer)
    wrong = [s for s in record["solutions"] if "no\n" in s["steps"]]
    assert wrong and record["check_failures"] == {"Timeout": len(wrong)}
    for solution in record["solutions"]:
        assert solution["exact"] == ([None, None] if solution in wrong else [True, True])
    assert f"{len(wrong)} checks of steps failed (Timeout)" in lines_of(summarise([record]))[-1]


def test_an_answer_that_only_holds_the_right_one_is_wrong(tiny_model_dir: Path, tokenizer: Any) -> None:
    """OpenR looks for the expected text inside the last sentence, so that 1 is found in 11 (a bug of its labels)."""

    class Says(LineEngine):
        def _continue(self, prompt: Any) -> tuple[list[int], str]:
            text = self._source.choice(("The answer is 11.", "The answer is 1."))
            return [*self._tokenizer.encode(text, add_special_tokens=False), self._tokenizer.eos_token_id], "stop"

    tree = checked(tiny_model_dir, {}, method="math_shepherd", completions=1, solutions=8).model_dump(mode="json")
    for scorer in ("math", "exact_match"):
        config = parse_config({**tree, "scoring": {"scorers": [{"name": scorer}], "timeout_s": 20.0}})
        (record,) = run(config, Says(tokenizer), tokenizer)
        judged = {"".join(s["steps"]): s["right"] for s in record["solutions"]}
        assert judged["The answer is 11."] is False
        if scorer == "math":
            assert judged["The answer is 1."] is True


def test_completions_of_a_chat_are_asked_in_its_template_and_share_their_prefix(tiny_model_dir: Path, tokenizer: Any) -> None:
    """OpenR sends the raw question without the model's template, and the prompt k times over without reusing it."""
    engine = LineEngine(tokenizer, lines=3, error=0.3, seed=1)
    (record,) = run(checked(tiny_model_dir, {"chat": True}, method="omega_prm", completions=5), engine, tokenizer)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "what is 1 + 0 ="}], add_generation_prompt=True, tokenize=False)
    asked = [tuple(call[0]) for call in engine.calls]
    assert all(tokenizer.decode(list(tokens)).startswith(chat) for tokens in asked)
    counts = Counter(asked)
    assert set(counts.values()) == {5} and len(counts) == record["estimates"], "k requests with the very same prefix, one state once"
    assert {call[3] for call in engine.calls} == {"label-q"}, "in one place of the queue, so that the cache holds it"


def test_without_a_scorer_of_answers_there_are_no_labels(tiny_model_dir: Path, tokenizer: Any) -> None:
    config = job(tiny_model_dir)
    config = parse_config({**config.model_dump(), "scoring": {"scorers": [{"name": "environment"}]}})
    with pytest.raises(ConfigError, match="labels need a scorer of answers"):
        run(config, LineEngine(tokenizer), tokenizer)


def test_settings_are_checked_and_belong_to_the_journal(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"labels\.completion.*did you mean labels\.completions"):
        load_config(None, ["labels.completion=3"])
    with pytest.raises(ConfigError, match=r"labels\.method"):
        load_config(None, ["labels.method=guess"])
    base = job(tiny_model_dir)
    assert header_of(base) == header_of(job(tiny_model_dir, items=3, format="parquet")), "these may change when a run goes on"
    assert header_of(base) != header_of(job(tiny_model_dir, completions=3))
    config = job(tiny_model_dir, items=7, split="held_out")
    task = get_task(config.task)
    assert [i.id for i in choose_items(config, task)] == [i.id for i in task.held_out()[:7]]
