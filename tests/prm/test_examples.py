"""What records become, and that a broken one is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from reasoner_ray.data.tasks import Item, Task
from reasoner_ray.errors import DataError
from reasoner_ray.prm.examples import encode_steps, read_examples, split, value_targets
from reasoner_ray.prm.settings import SupervisedConfig
from reasoner_ray.trajectory import flatten
from tests.prm.conftest import make_examples, write_examples

PLAIN = SupervisedConfig(separator="\n", held_out_fraction=0.5)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def write(path: Path, *records: Any) -> list[str]:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return [str(path)]


def test_steps_keep_their_ends(tmp_path: Path, tokenizer: Any) -> None:
    names = write(tmp_path / "a.jsonl", {"question": "1 + 2?", "steps": ["so 3", "\n\nodd text", "is 3"], "labels": ["+", 0.25, None]})
    (example,), left_out = read_examples(names, "prm", PLAIN, tokenizer)
    decoded = [tokenizer.decode(step) for step in example.partial.steps]
    assert decoded == ["so 3\n", "\n\nodd text\n", "is 3<|eos|>"], "a separator inside a step does not cut it"
    assert (tokenizer.decode(example.partial.prompt), example.labels, left_out) == ("1 + 2?", (1.0, 0.25, None), {})
    trajectory = example.trajectory("prm", PLAIN)
    ends = example.partial.ends
    assert trajectory.loss_mask.nonzero()[0].tolist() == list(ends[:2]), "the token behind a step's last one; null is not learnt"
    assert flatten([trajectory]).rewards.tolist() == [1.0, 0.25]
    hard = PLAIN.model_copy(update={"labels": "hard"})
    assert flatten([example.trajectory("prm", hard)]).rewards.tolist() == [1.0, 1.0], "Math-Shepherd: any right completion"
    half = hard.model_copy(update={"hard_above": 0.5})
    assert flatten([example.trajectory("prm", half)]).rewards.tolist() == [1.0, 0.0], "MATH-APS: more than half"


def test_values_by_hand(tmp_path: Path, tokenizer: Any) -> None:
    assert value_targets(-1.0, 3, 1.0) == [-1.0] * 4
    assert value_targets(1.0, 3, 0.5) == [0.25, 0.5, 1.0, 1.0]
    names = write(tmp_path / "a.jsonl", {"prompt": "q", "steps": ["a", "b"], "reward": -1})
    ((example,), _) = read_examples(names, "value", PLAIN, tokenizer)
    trajectory = example.trajectory("value", PLAIN)
    assert trajectory.loss_mask.nonzero()[0].tolist() == [example.partial.start, *example.partial.ends]


def test_chats_and_answers(tmp_path: Path, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]
    names = write(tmp_path / "a.jsonl", {"prompt": chat, "answer": "yes"}, {"prompt": "hi", "solution": "yes"})
    settings = PLAIN.model_copy(update={"chat": True, "end_of_text": False})
    (one, other), _ = read_examples(names, "sft", settings, tokenizer)
    assert one.partial == other.partial
    assert tokenizer.decode(one.partial.tokens) == "user: hi\nassistant: yes"


def test_tokens_come_back_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    examples = make_examples(6)
    found, _ = read_examples([str(write_examples(tmp_path / "a.jsonl", examples))], "prm", PLAIN, tokenizer)
    assert [(e.partial, e.labels, e.reward) for e in found] == [(e.partial, e.labels, e.reward) for e in examples]
    assert len({e.id for e in found}) == 6


class _Solved(Task):
    def train(self) -> list[Item]:
        return [Item(id="a", prompt="1 + 1 =", answer="2", info={"solution": " 2"})]

    def held_out(self) -> list[Item]:
        return []


def test_a_tasks_own_solutions(tokenizer: Any) -> None:
    ((example,), _) = read_examples(["task"], "sft", PLAIN, tokenizer, _Solved())
    assert tokenizer.decode(example.partial.tokens) == "1 + 1 = 2<|eos|>"


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("prm", {"prompt": "q", "steps": ["a", "b"], "labels": [1]}, "1 labels for 2 steps"),
        ("prm", {"prompt": "q", "steps": ["a"], "labels": [2]}, r"a label must be in \[0, 1\]"),
        ("prm", {"prompt": "q", "steps": ["a"]}, "no step has a label"),
        ("prm", {"prompt": "q", "steps": ["a", ""], "labels": [1, 1]}, "'steps' must be a list of non-empty texts"),
        ("prm", {"steps": ["a"], "labels": [1]}, "no value for 'question'"),
        ("prm", {"prompt": 3, "steps": ["a"], "labels": [1]}, "the prompt must be a text or a list of messages"),
        ("prm", {"tokens": [1, 2, 3], "start": 1, "ends": [2], "labels": [1]}, "do not cover tokens 1 to 3; a record of tokens"),
        ("prm", {"tokens": [1, 2, 3], "start": 1, "labels": [1]}, "no value for 'ends'"),
        ("prm", {"prompt": "q", "steps": ["a"], "labels": 5}, "'labels' must be a list"),
        ("prm", {"tokens": [1, 1 << 40], "start": 1, "ends": [2], "labels": [1]}, "a token is a number from 0"),
        ("prm", {"tokens": [1, -4], "start": 1, "ends": [2], "labels": [1]}, "a token is a number from 0"),
        ("value", {"tokens": [1, 2], "start": 0, "ends": [2], "reward": 1}, "a prompt has at least one token"),
        ("sft", {"tokens": [1, 2], "start": 0}, "a prompt has at least one token"),
        ("value", {"prompt": "q", "steps": ["a"]}, "no `reward`"),
        ("value", {"prompt": "q", "steps": ["a"], "reward": "high"}, "'reward' must be a finite number"),
        ("sft", {"prompt": "q"}, "no value for 'solution'"),
        ("sft", "{broken", "not valid JSON"),
    ],
)
def test_a_broken_record_names_its_line(kind: Any, record: Any, message: str, tmp_path: Path, tokenizer: Any) -> None:
    good = {"prompt": "q", "steps": ["a"], "labels": [1], "reward": 1, "answer": "a"}
    names = write(tmp_path / "a.jsonl", good, record)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{message}"):
        read_examples(names, kind, PLAIN, tokenizer)


def test_what_is_left_out_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    short = PLAIN.model_copy(update={"max_tokens": 8})
    names = write(tmp_path / "a.jsonl", {"prompt": "q", "answer": "a"}, {"prompt": "q", "answer": "1 2 3 4 5 6 7 8 9" * 5})
    examples, left_out = read_examples(names, "sft", short, tokenizer)
    assert (len(examples), left_out) == (1, {"longer than supervised.max_tokens=8": 1})
    steps = {"prompt": "q", "steps": ["a", "b"]}
    names = write(tmp_path / "b.jsonl", steps | {"labels": [None, 1], "reward": 1}, steps | {"labels": [None, None], "reward": None})
    for kind, reason in (("prm", "without a single label"), ("value", "without a reward")):
        examples, left_out = read_examples(names, kind, PLAIN, tokenizer)  # type: ignore[arg-type]
        assert (len(examples), left_out) == (1, {reason: 1})
    with pytest.raises(DataError, match=r"no solution of .* can be learnt from: 2 longer than supervised\.max_tokens=2"):
        read_examples(names, "sft", PLAIN.model_copy(update={"max_tokens": 2}), tokenizer)


def test_wrong_solutions_are_not_imitated(tmp_path: Path, tokenizer: Any) -> None:
    """TS-LLM's builder of fine-tuning data took every rollout, right or wrong."""
    records = [{"prompt": "q", "answer": answer, **extra} for answer, extra in (("a", {"reward": 1}), ("b", {"reward": 0}), ("c", {}))]
    names = write(tmp_path / "a.jsonl", *records, {"prompt": "q", "answer": "d", "reward": None})

    def learnt(**settings: Any) -> list[str]:
        examples, left_out = read_examples(names, "sft", PLAIN.model_copy(update={"end_of_text": False, **settings}), tokenizer)
        assert len(examples) + left_out.total() == 4
        return [tokenizer.decode(e.partial.solution) for e in examples]

    assert learnt() == ["a", "c"]
    assert learnt(learn_above=-0.5) == ["a", "b", "c"]
    assert learnt(learn_above=None) == ["a", "b", "c", "d"]


def test_a_question_is_on_one_side() -> None:
    examples = [*make_examples(40), *make_examples(40)]
    learnt, held_out = split(examples, 0.5)
    assert len(learnt) + len(held_out) == 80 and 20 <= len(held_out) <= 60
    assert not {e.partial.prompt for e in learnt} & {e.partial.prompt for e in held_out}
    assert split(examples, 0.0) == (examples, [])


def test_encoding_by_steps_needs_no_separator(tokenizer: Any) -> None:
    partial = encode_steps([5], ["ab", "c"], tokenizer, end_of_text=False)
    assert len(partial.ends) == 2 and tokenizer.decode(partial.solution) == "abc"
