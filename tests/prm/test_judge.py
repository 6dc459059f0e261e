"""A judge that is taught: asked in training as in scoring, token for token, and refused where it cannot be asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.errors import ConfigError, ModelError, ScoringError
from reasoner_ray.packing import pack
from reasoner_ray.prm.examples import read_examples
from reasoner_ray.prm.formats import JudgeModel
from reasoner_ray.prm.judge import judge_args, verdict_logits
from reasoner_ray.prm.pool import StepModelSpec, load_step_model
from reasoner_ray.prm.settings import SupervisedConfig
from reasoner_ray.scoring.step_scorers import STEP_SCORERS, StepScorerContext
from reasoner_ray.trajectory import flatten

ASKED = {"question": r"user: (.*)\nassistant: ", "yes": "a", "no": "b"}
"""The tiny tokenizer has no token for Yes."""
RECORDS = [
    {"prompt": "what is 2 + 3?", "steps": ["add both", "so it is 5"], "labels": [1, 0.25]},
    {"prompt": "what is 2 times 3?", "steps": ["add both", "so it is 5", "stop"], "labels": [0, None, 1]},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def settings(tmp_path: Path) -> SupervisedConfig:
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    data = (str(tmp_path / "labels.jsonl"),)
    return SupervisedConfig(data=data, held_out_fraction=0, chat=True, head="judge", scorer=ASKED, end_of_text=False)


class Listens:
    """An engine that keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    async def next_logprobs(self, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> list[float]:
        self.asked.append(list(prompt))
        return [0.0, 0.0]


def test_training_and_scoring_ask_alike(
    settings: SupervisedConfig, tokenizer: Any, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token ids of a training context are those that both judges read: the one by path and the one in the policy's engine."""
    examples, _ = read_examples(settings.data, "prm", settings, tokenizer)
    taught = [list(context) for e in examples if e.asked for context in e.asked.contexts]
    assert len(taught) == 5

    read: list[list[int]] = []

    def reads(self: JudgeModel, contexts: Sequence[list[int]]) -> list[float]:
        read.extend(contexts)
        return [0.5] * len(contexts)

    monkeypatch.setattr(JudgeModel, "_read", reads)
    path = str(tiny_model_dir)
    args: dict[str, Any] = judge_args(settings)
    model = load_step_model(StepModelSpec(model=path, policy=path, dtype="float32", **args))
    model.score([e.partial for e in examples])
    assert read == taught

    engine = Listens()
    context: Any = StepScorerContext(config=parse_config({"model": {"path": path}}), engine=engine, tokenizer=tokenizer)  # type: ignore[arg-type]
    asyncio.run(STEP_SCORERS.get("judge")(context, **ASKED).score([e.partial for e in examples]))
    assert engine.asked == taught
    by_path: Any = STEP_SCORERS.get("prm")(context, model=path, dtype="float32", **args)
    assert by_path._pool._spec == StepModelSpec(model=path, policy=path, dtype="float32", **args), "search and RL ask the same"
    text = tokenizer.decode(taught[1])
    assert text.endswith(
        "Question: what is 2 + 3?\n\nStep 1: add both\nStep 2: so it is 5\n\nIs step 2 correct? Answer Yes or No.\nassistant: "
    )


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_only_verdicts_are_learnt(labels: Any, settings: SupervisedConfig, tokenizer: Any) -> None:
    """Both verdicts on each labelled step, weighed p and 1 - p; what steps have in common is computed once."""
    settings = settings.model_copy(update={"labels": labels})
    examples, _ = read_examples(settings.data, "prm", settings, tokenizer)
    rows = [e.trajectory("prm", settings) for e in examples]
    yes, no = (tokenizer.encode(answer)[0] for answer in "ab")
    assert [row.tokens[row.loss_mask].tolist() for row in rows] == [[yes, no] * 2, [yes, no] * 2], "a step without a label is left out"
    second = 0.25 if labels == "soft" else 1.0
    assert flatten(rows).rewards.tolist() == [1, 0, second, 1 - second, 0, 1, 1, 0]
    (batch,) = pack(rows, tokens_per_microbatch=10_000, bootstrap="none")
    assert batch.n_trained == 8 and batch.n_packed < sum(len(row.tokens) for row in rows) / 2
    said, targets = verdict_logits(torch.tensor([-1.0, -3.0, -2.0, -0.5]), torch.tensor([1.0, 0.0, 0.25, 0.75]))
    assert said.tolist() == [2.0, -1.5] and targets.tolist() == [1.0, 0.25]


def test_long_questions_are_left_out(settings: SupervisedConfig, tokenizer: Any) -> None:
    """The length that counts is that of the context with its verdict."""
    examples, _ = read_examples(settings.data, "prm", settings, tokenizer)
    longest = [e.asked.longest for e in examples if e.asked]
    shorter = settings.model_copy(update={"max_tokens": min(longest)})
    kept, left_out = read_examples(settings.data, "prm", shorter, tokenizer)
    assert len(kept) == 1 and left_out == {f"longer than supervised.max_tokens={min(longest)}": 1}
    assert len(examples[0].partial.tokens) < min(longest)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("value", {}, "supervised.head: a judge is taught by labels of steps; take kind: prm"),
        ("sft", {}, "supervised.head: a judge is taught by labels of steps; take kind: prm"),
        ("prm", {"learner": {"critic": "joint"}}, "learner.critic: a judge answers with its LM head; set learner.critic=none"),
        ("prm", {"rollout": {"temperature": 0.5}}, "rollout.temperature: a judge is asked at temperature 1"),
        ("prm", {"supervised": {"scorer": {"format": "qwen"}}}, "supervised.scorer.format: supervised.head=judge is scored as a judge"),
        ("prm", {"supervised": {"scorer": {"yes": "No"}}}, "the verdicts must differ"),
    ],
)
def test_what_cannot_work_is_refused(kind: str, changes: dict[str, Any], message: str, job: Callable[..., JobConfig]) -> None:
    with pytest.raises(ConfigError, match=message):
        job(kind, **{**changes, "supervised": {"head": "judge", **changes.get("supervised", {})}})


def test_what_cannot_be_asked_is_refused(settings: SupervisedConfig, tokenizer: Any, tiny_model_dir: Path) -> None:
    def read(scorer: dict[str, Any]) -> None:
        read_examples(settings.data, "prm", settings.model_copy(update={"scorer": scorer}), tokenizer)

    with pytest.raises(ModelError, match="'Yes' is 2 tokens of its tokenizer"):
        read({})
    with pytest.raises(ConfigError, match=r"supervised\.scorer"):
        read({**ASKED, "quesion": "x"})
    with pytest.raises(ScoringError, match="finds no question in the prompt"):
        read({**ASKED, "question": "<(x)>"})
    with pytest.raises(ConfigError, match=r"args\.yes and args\.no are the verdicts of a judge"):
        StepModelSpec(model="m", policy="m", yes="+")
    plain = AutoTokenizer.from_pretrained(tiny_model_dir)
    plain.chat_template = None
    with pytest.raises(ScoringError, match="its tokenizer has no chat template; take a chat model"):
        read_examples(settings.data, "prm", settings.model_copy(update={"chat": False, "scorer": {"yes": "a", "no": "b"}}), plain)
