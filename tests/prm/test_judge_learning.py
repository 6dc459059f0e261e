"""A chat model learns to judge: the objective by hand, and scores of the folder that it wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasoner_ray.config import JobConfig
from reasoner_ray.learner.heads import has_head
from reasoner_ray.learner.learner import Learner
from reasoner_ray.learner.predict import predict
from reasoner_ray.prm.examples import Example, read_examples
from reasoner_ray.prm.judge import judge_args
from reasoner_ray.prm.pool import StepModelSpec, load_step_model
from reasoner_ray.trainer.supervised import held_out_metrics
from reasoner_ray.trajectory import Trajectory

Job = Callable[..., JobConfig]


def sums(a: int, slip: bool, labels: tuple[float, float]) -> dict[str, Any]:
    return {"prompt": f"what is {a} + 3?", "steps": ["add both", "stop" if slip else "write it down"], "labels": labels}


def judged_job(job: Job, tmp_path: Path, records: list[dict[str, Any]], **sections: Any) -> tuple[JobConfig, list[Example]]:
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, records)))
    scorer = {"question": r"user: (.*)\nassistant: ", "yes": "a", "no": "b"}
    data = {"head": "judge", "data": [str(tmp_path / "labels.jsonl")], "chat": True, "held_out_fraction": 0, "scorer": scorer}
    config = job("prm", supervised=data, **sections)
    tokenizer: Any = AutoTokenizer.from_pretrained(config.model.path)
    return config, read_examples(config.supervised.data, "prm", config.supervised, tokenizer)[0]


def rows(config: JobConfig, examples: list[Example]) -> list[Trajectory]:
    return [e.trajectory("prm", config.supervised) for e in examples]


@pytest.mark.parametrize("budget", [8192, 60])
def test_the_loss_is_the_cross_entropy_of_the_verdict(budget: int, job: Job, tmp_path: Path, tiny_model_dir: Path) -> None:
    """By transformers' own forward pass, soft labels and all, however the contexts are packed."""
    records = [sums(1, True, (1.0, 0.25)), sums(2, False, (0.5, 1.0))]
    config, examples = judged_job(job, tmp_path, records, learner={"tokens_per_microbatch": budget})
    learner = Learner(config)
    assert learner.engine.policy.value_head is None
    metrics = learner.train_step([rows(config, examples)])
    lm, terms = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), []
    for e in examples:
        assert e.asked is not None
        for context, p in zip(e.asked.contexts, e.labels, strict=True):
            with torch.no_grad():
                yes, no = F.log_softmax(lm(torch.tensor([context])).logits[0, -1], -1)[list(e.asked.answers)].tolist()
            assert p is not None
            terms.append(-p * yes - (1 - p) * no)
    assert metrics["learner/loss"] == pytest.approx(sum(terms) / 4, rel=1e-5)
    assert (metrics["learner/micro_batches"] > 1) == (budget == 60)


def test_a_judge_learns_and_scores_by_its_folder(job: Job, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Wrong steps get low scores from the plain chat model that training wrote; held-out figures are those of its scores."""
    records = [sums(a, slip, (1.0, float(not slip))) for a in range(4) for slip in (False, True)]
    config, examples = judged_job(job, tmp_path, records, learner={"lr": 3e-3})
    learner = Learner(config)
    losses = [learner.train_step([rows(config, examples)])["learner/loss"] for _ in range(30)]
    assert losses[0] > 2 and losses[-1] < 0.1
    learner.export(tmp_path / "model")
    assert not has_head(tmp_path / "model"), "a plain folder"
    args: dict[str, Any] = judge_args(config.supervised)
    judge = load_step_model(StepModelSpec(model=str(tmp_path / "model"), policy=str(tiny_model_dir), dtype="float32", **args))
    scores = judge.score([e.partial for e in examples])
    pairs = [(s, y) for e, each in zip(examples, scores, strict=True) for s, y in zip(each, e.labels, strict=True)]
    assert min(s for s, y in pairs if y == 1) > 0.9 and max(s for s, y in pairs if y == 0) < 0.1
    untrained = load_step_model(StepModelSpec(model=str(tiny_model_dir), policy=str(tiny_model_dir), dtype="float32", **args))
    before = [s for each in untrained.score([e.partial for e in examples]) for s in each]
    assert max(before) - min(before) < 0.5, "the test would not see a judge that knew it"

    places, said = predict(learner, rows(config, examples))
    figures = held_out_metrics("prm", rows(config, examples), [(places, said)], config.supervised)
    assert figures["auc"] == 1.0 and figures["steps"] == len(pairs)
    logits = torch.zeros(len(said)).index_put((places,), said).view(-1, 2)
    found = [1 / (1 + math.exp(no - yes)) for yes, no in logits.tolist()]
    assert found == pytest.approx([s for s, _ in pairs], abs=1e-5)
