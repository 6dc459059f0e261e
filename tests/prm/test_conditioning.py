"""Control texts before prompts, and the best share: by hand, and through what a supervised job reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.errors import ConfigError, DataError
from reasoner_ray.models import load_tokenizer
from reasoner_ray.prm.conditioning import bucket_of, conditioned, control_text
from reasoner_ray.prm.examples import Example
from reasoner_ray.prm.settings import ConditionConfig
from reasoner_ray.steps import Partial
from reasoner_ray.trainer.launch import asking_for_the_best, load_task
from reasoner_ray.trainer.supervised import load_examples

CONDITION = {"text": "reward {bucket} of {top}: ", "above": [0.0, 0.5]}


def job(folder: Path, model: Path, **supervised: Any) -> JobConfig:
    """Six solutions of three questions; the rewards are 0 to 1."""
    records = [{"prompt": f"what is {i // 2} times 3?", "answer": f"{i}", "reward": i / 5} for i in range(6)]
    (folder / "scored.jsonl").write_text("\n".join(map(json.dumps, records)))
    settings = {"data": [str(folder / "scored.jsonl")], "held_out_fraction": 0, "learn_above": None, **supervised}
    return parse_config({"kind": "sft", "model": {"path": str(model)}, "supervised": settings})


def test_buckets_by_hand() -> None:
    assert [bucket_of(x, (0.0, 0.5)) for x in (-1.0, 0.0, 0.1, 0.5, 0.6)] == [0, 0, 1, 1, 2], "above a threshold, not at it"
    assert control_text(2, ConditionConfig(**CONDITION)) == "reward 2 of 2: "


def test_each_prompt_is_told_what_its_solution_earned(tmp_path: Path, tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    plain, _, _ = load_examples(job(tmp_path, tiny_model_dir))
    told, _, left_out = load_examples(job(tmp_path, tiny_model_dir, condition=CONDITION))
    assert len(told) == len(plain) == 6 and not left_out
    for i, (before, after) in enumerate(zip(plain, told, strict=True)):
        control = f"reward {bucket_of(i / 5, (0.0, 0.5))} of 2: "
        assert tokenizer.decode(after.partial.prompt) == control + tokenizer.decode(before.partial.prompt)
        assert after.partial.tokens[after.partial.start :] == before.partial.tokens[before.partial.start :]
        learnt = after.trajectory("sft", job(tmp_path, tiny_model_dir).supervised)
        assert int(learnt.loss_mask.sum()) == len(before.partial.tokens) - before.partial.start, "the control text is not learnt"


def test_a_control_text_follows_the_token_that_begins_a_text(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.bos_token = tokenizer.eos_token
    begun = Example(id="0", where="0", partial=Partial((tokenizer.bos_token_id, 7, 8), (3,), 2), reward=1.0)
    (told,) = conditioned([begun], ConditionConfig(**CONDITION), tokenizer)
    control = tuple(tokenizer.encode("reward 2 of 2: ", add_special_tokens=False))
    assert told.partial == Partial((tokenizer.bos_token_id, *control, 7, 8), (3 + len(control),), 2 + len(control))


def test_what_has_no_room_for_its_control_text_is_counted(tmp_path: Path, tiny_model_dir: Path) -> None:
    plain, _, _ = load_examples(job(tmp_path, tiny_model_dir))
    longest = max(len(example.partial.tokens) for example in plain)
    told, _, left_out = load_examples(job(tmp_path, tiny_model_dir, condition=CONDITION, max_tokens=longest))
    assert not told and left_out == {f"longer than supervised.max_tokens={longest} with their control text": 6}


def test_a_question_stays_on_one_side_whatever_it_is_told(tmp_path: Path, tiny_model_dir: Path) -> None:
    sides = load_examples(job(tmp_path, tiny_model_dir, condition=CONDITION, held_out_fraction=0.5))[:2]
    plain = load_examples(job(tmp_path, tiny_model_dir, held_out_fraction=0.5))[:2]
    assert [[e.id for e in side] for side in sides] == [[e.id for e in side] for side in plain] and all(len(side) for side in sides)


def test_the_best_share(tmp_path: Path, tiny_model_dir: Path) -> None:
    best, _, _ = load_examples(job(tmp_path, tiny_model_dir, keep_top=0.4))
    assert [e.reward for e in best] == [0.6, 0.8, 1.0], "40 % of six, rounded up"
    both, _, _ = load_examples(job(tmp_path, tiny_model_dir, keep_top=0.1, condition=CONDITION))
    assert [e.reward for e in both] == [1.0]


def test_what_cannot_work_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    for supervised, message in (
        ({"condition": {"text": "good"}}, "must hold {bucket}"),
        ({"condition": {"text": "{x}"}}, "cannot be filled in"),
        ({"condition": {"above": [1.0, 0.0]}}, "thresholds must rise"),
        ({"condition": CONDITION, "learn_above": 0.0}, "supervised.learn_above=null"),
    ):
        with pytest.raises(ConfigError, match=message):
            job(tmp_path, tiny_model_dir, **supervised)
    config = job(tmp_path, tiny_model_dir, keep_top=0.5)
    (tmp_path / "scored.jsonl").write_text(json.dumps({"prompt": "q", "answer": "a"}))
    with pytest.raises(DataError, match="line 1: no `reward`"):
        load_examples(config)


def test_a_policy_is_told_the_best_in_prompts_and_in_episodes(tmp_path: Path, tiny_model_dir: Path) -> None:
    taught = job(tmp_path, tiny_model_dir, condition=CONDITION)
    config, task, tokenizer = load_task(asking_for_the_best(taught))
    assert config.task.control == "reward 2 of 2: ", "`reasoner eval` of the job that taught it asks for the best"
    (item,) = task.held_out()[:1]
    assert tokenizer.decode(task.render(item, tokenizer)) == f"reward 2 of 2: {item.prompt}"
    assert load_task(taught)[1].control == "", "labels and searches record prompts as they are"
    told = parse_config({"model": {"path": str(tiny_model_dir)}, "task": {"control": "reward 0 of 2: "}})
    assert load_task(told)[0].task.control == "reward 0 of 2: " == load_task(told)[1].control
    plain, task, _ = load_task(job(tmp_path, tiny_model_dir))
    assert plain.task.control == "" and tokenizer.decode(task.render(item, tokenizer)) == item.prompt
