"""The driver of supervised training: every solution once an epoch, checkpoints and restarts, held-out figures; whole runs through Ray.

Beside the learner's tests, for its learners are in this process: they must come before the engines of tests/rollout, whose
process group would lie under theirs.
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reasoner_ray.config import JobConfig, load_config, parse_config, to_yaml
from reasoner_ray.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem, LearnerLost, ModelError
from reasoner_ray.learner.heads import has_head
from reasoner_ray.learner.learner import Learner
from reasoner_ray.learner.predict import predict, predict_stored
from reasoner_ray.prm.examples import Example
from reasoner_ray.prm.model import ProcessModel
from reasoner_ray.trainer.checkpoint import list_checkpoints
from reasoner_ray.trainer.supervised import Parts, SupervisedDriver, load_examples, order_of, with_steps
from tests.prm.conftest import make_examples, write_examples
from tests.trainer.fakes import FakeTracker
from tests.trainer.local import LocalLearner


class LocalLearners(LocalLearner):
    """A learner in this process behind the driver's interface; dies at the steps it is told to."""

    def __init__(self, config: JobConfig, dies_at: tuple[int, ...] = ()) -> None:
        self._config, self._dies_at = config, list(dies_at)
        self.learner = Learner(config)
        self.steps = self.restarts = 0
        self.seen: list[list[str]] = []

    async def start(self) -> None: ...

    async def train_step(self, groups: Any) -> dict[str, float]:
        self.steps += 1
        if self.steps in self._dies_at:
            self._dies_at.remove(self.steps)
            raise LearnerLost("rank 0 was killed")
        self.seen.append([t.id for group in groups for t in group])
        return self.learner.train_step(groups)

    async def run(self, function: Any, stored: Any) -> list[Any]:
        assert function is predict_stored
        return [predict(self.learner, stored[0])]

    async def restart(self) -> None:
        self.restarts += 1
        self.learner = Learner(self._config)

    async def stop(self) -> None: ...


def job(folder: Path, model: Path, kind: str = "prm", **sections: Any) -> JobConfig:
    tree: dict[str, Any] = {
        "name": "run",
        "kind": kind,
        "out": str(folder),
        "model": {"path": str(model), "dtype": "float32"},
        "learner": {"lr": 1e-3, "critic_lr": 1e-2, "torch_threads": 1, "cpus": 0},
        "supervised": {"batch": 4, "epochs": 2},
        "trainer": {"eval_every": 2, "checkpoint_every": 1},
        "tracking": {"wandb": "off", "terminal": "plain"},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_config(tree)


def driver(config: JobConfig, examples: list[Example], held_out: list[Example], dies_at: tuple[int, ...] = ()) -> SupervisedDriver:
    config = with_steps(config, len(examples))
    parts: dict[str, Any] = {"learners": LocalLearners(config, dies_at), "tracker": FakeTracker(), "store": lambda thing: thing}
    return SupervisedDriver(config, Parts(order=order_of(examples, config.seed), held_out=held_out, **parts))


def trained_weights(made: SupervisedDriver) -> dict[str, torch.Tensor]:
    policy = made.parts.learners.learner.engine.policy
    return {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> SupervisedDriver:
    """A run of two epochs over ten solutions in batches of four: five steps."""
    made = driver(job(tmp_path_factory.mktemp("straight"), tiny_model_dir), make_examples(10), make_examples(6, seed=1))
    asyncio.run(made.run())
    return made


def test_every_solution_once_an_epoch(straight: SupervisedDriver) -> None:
    seen = [name for batch in straight.parts.learners.seen for name in batch]
    assert [len(batch) for batch in straight.parts.learners.seen] == [4] * 5
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(f"e{i}" for i in range(10)) and seen[:10] != seen[10:]
    assert straight.finished
    tracker: Any = straight.parts.tracker
    assert list(tracker.steps) == [1, 2, 3, 4, 5] and tracker.steps[5]["train/epoch"] == 2
    assert not any(key.startswith("mismatch/") for metrics in tracker.steps.values() for key in metrics)
    assert [step for step, _ in tracker.evals] == [0, 2, 4, 5]
    assert tracker.evals[0][1]["eval/auc"] == 0.5, "an untrained head ties everything"
    assert {"eval/loss", "eval/accuracy", "eval/steps"} <= straight.last_eval.keys()
    assert has_head(straight.config.run_dir / "model")


def test_a_falling_learning_rate_goes_on_where_it_was(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Five steps by the cosine after one of warm-up, broken off and resumed in between: the rates, and the weights to the bit."""
    settings = {"lr": 1e-3, "critic_lr": 1e-2, "torch_threads": 1, "warmup_steps": 1, "lr_schedule": "cosine"}
    whole = driver(job(tmp_path / "a", tiny_model_dir, learner=settings), make_examples(10), [])
    asyncio.run(whole.run())
    broken = driver(job(tmp_path / "b", tiny_model_dir, learner=settings), make_examples(10), [], dies_at=(4,))
    asyncio.run(broken.run())
    trackers: list[Any] = [made.parts.tracker for made in (whole, broken)]
    for tracker in trackers:
        rates = [tracker.steps[step]["learner/lr"] for step in range(1, 6)]
        assert rates == pytest.approx([1e-3 * (1.0 if u < 1 else (1 + math.cos(math.pi * (u - 1) / 4)) / 2) for u in range(5)])
    assert broken.parts.learners.restarts == 1
    assert all(value.equal(trained_weights(broken)[name]) for name, value in trained_weights(whole).items())


def test_a_head_of_another_kind_is_no_beginning(straight: SupervisedDriver, tmp_path: Path) -> None:
    """The logit of a process reward model is not a value: going on from it would mean something else."""
    folder = straight.config.run_dir / "model"
    value = job(tmp_path, folder, kind="value")
    with pytest.raises(ModelError, match=r"holds a model of kind prm, and kind value would .*take kind: prm, or a model without a head"):
        Learner(value)
    assert Learner(job(tmp_path, folder)).engine.policy.value_head is not None, "the same kind goes on"


def test_held_out_figures_are_those_of_the_exported_model(straight: SupervisedDriver) -> None:
    scorer = ProcessModel(str(straight.config.run_dir / "model"), dtype="float32")
    examples = make_examples(6, seed=1)
    scores = torch.tensor([s for each in scorer.score([e.partial for e in examples]) for s in each])
    labels = torch.tensor([y for e in examples for y in e.labels])
    loss = torch.nn.functional.binary_cross_entropy(scores, labels)  # type: ignore[arg-type]
    assert straight.last_eval["eval/loss"] == pytest.approx(float(loss), abs=1e-5)


def test_a_lost_learner_goes_back_to_its_checkpoint(straight: SupervisedDriver, tmp_path: Path, tiny_model_dir: Path) -> None:
    made = driver(job(tmp_path, tiny_model_dir), make_examples(10), make_examples(6, seed=1), dies_at=(1, 4))
    asyncio.run(made.run())
    assert made.parts.learners.restarts == 2
    assert made.parts.learners.seen == straight.parts.learners.seen, "no batch is learnt twice or left out"
    assert all(value.equal(trained_weights(made)[name]) for name, value in trained_weights(straight).items())
    tracker: Any = made.parts.tracker
    assert tracker.steps[5]["faults/learner_restarts"] == 2
    weak = driver(job(tmp_path / "weak", tiny_model_dir, learner={"restart_limit": 0}), make_examples(10), [], dies_at=(1,))
    with pytest.raises(EnvironmentProblem, match=r"died 1 times \(learner\.restart_limit=0\)"):
        asyncio.run(weak.run())


def test_a_stopped_run_resumes_to_the_same_weights(straight: SupervisedDriver, tmp_path: Path, tiny_model_dir: Path) -> None:
    config, examples, held_out = job(tmp_path, tiny_model_dir), make_examples(10), make_examples(6, seed=1)
    first = driver(config, examples, held_out)
    tracker: Any = first.parts.tracker
    tracker.log = lambda step, metrics: first.request_stop() if step == 2 else None
    asyncio.run(first.run())
    assert first.step == 2 and not first.finished
    second = driver(config, examples, held_out)
    asyncio.run(second.run(list_checkpoints(config.run_dir)[-1]))
    assert second.finished and second.step == 5
    assert all(value.equal(trained_weights(second)[name]) for name, value in trained_weights(straight).items())
    other = driver(config, make_examples(11), held_out)
    with pytest.raises(CheckpointError, match="other training data"):
        asyncio.run(other.run(list_checkpoints(config.run_dir)[-1]))
    larger = driver(job(tmp_path, tiny_model_dir, supervised={"batch": 5}), examples, held_out)
    with pytest.raises(CheckpointError, match=r"supervised\.batch=4 solutions, the job has 5"):
        asyncio.run(larger.run(list_checkpoints(config.run_dir)[-1]))


def test_ranks_share_a_batch(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Three ranks and a last batch of two: shares of different sizes, one of them empty, and every solution in one of them."""
    config = with_steps(job(tmp_path, tiny_model_dir, supervised={"batch": 4, "epochs": 1}, learner={"ranks": 3}), 6)
    shares: list[list[list[str]]] = []

    class Noting:
        async def train_step(self, groups: Any) -> dict[str, float]:
            shares.append([[t.id for t in group] for group in groups])
            return {}

    made = SupervisedDriver(
        config,
        Parts(learners=Noting(), tracker=FakeTracker(), order=order_of(make_examples(6), 0), held_out=[], store=lambda x: x),  # type: ignore[arg-type]
    )

    async def two_steps() -> None:
        for _ in range(2):
            await made._train_step()

    asyncio.run(two_steps())
    assert [[len(share) for share in step] for step in shares] == [[2, 1, 1], [1, 1, 0]]
    assert sorted(name for step in shares for share in step for name in share) == [f"e{i}" for i in range(6)]


def test_a_rank_may_have_nothing(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The learner takes an empty share beside others; alone it is refused."""
    config = job(tmp_path, tiny_model_dir)
    learner = Learner(config)
    with pytest.raises(ValueError, match="holds no token to train on"):
        learner.train_step([[]])
    trajectories = [e.trajectory("prm", config.supervised) for e in make_examples(2)]
    assert learner.train_step([[], trajectories])["learner/loss"] > 0


def test_what_a_job_learns_from(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = write_examples(tmp_path / "a.jsonl", make_examples(40))
    config = job(tmp_path, tiny_model_dir, supervised={"data": [str(data)], "held_out_fraction": 0.25, "max_tokens": 12})
    examples, held_out, left_out = load_examples(config)
    assert len(examples) + len(held_out) + left_out.total() == 40 and min(len(examples), len(held_out), left_out.total()) > 0
    some = write_examples(tmp_path / "b.jsonl", make_examples(10))
    given = config.supervised.model_copy(update={"held_out": (str(some),)})
    kept, asked, dropped = load_examples(config.model_copy(update={"supervised": given}))
    assert kept and asked and not {e.partial.prompt for e in kept} & {e.partial.prompt for e in asked}
    assert dropped["of a question that is held out"] > 0
    same = config.supervised.model_copy(update={"held_out": (str(data),)})
    with pytest.raises(DataError, match="nothing is left to learn from"):
        load_examples(config.model_copy(update={"supervised": same}))
    with pytest.raises(ConfigError, match=r"supervised\.data: kind prm needs files"):
        load_examples(job(tmp_path, tiny_model_dir))
    with pytest.raises(DataError, match="no data file"):
        load_examples(job(tmp_path, tiny_model_dir, supervised={"data": ["nowhere.jsonl"]}))
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text(json.dumps({"tokens": [1, 100_000], "start": 1, "ends": [2], "labels": [1]}))
    with pytest.raises(DataError, match=r"foreign\.jsonl, line 1: token 100000 is not among the model's"):
        load_examples(job(tmp_path, tiny_model_dir, supervised={"data": [str(foreign)], "held_out_fraction": 0.0}))
    with pytest.raises(DataError, match=r"has no info\['solution'\]"):
        load_examples(job(tmp_path, tiny_model_dir, "sft", supervised={"data": ["task"]}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kind=prm", "learner.critic=shared"], r"learner\.critic: kind prm is a head that trains the model"),
        (["kind=sft", "learner.critic=shared"], r"learner\.critic: kind sft trains no value head"),
        (["kind=prm", "learner.updates_per_step=2"], r"learner\.updates_per_step: a step of kind prm is one update"),
        (["kind=sft", "rollout.temperature=0.7"], r"rollout\.temperature: kind sft"),
        (["kind=value", "supervised.data=[task]"], r"supervised\.data: a task has solutions without labels"),
        (["kind=prm", "supervised.processbench=[a/t.json,b/t.json]"], r"supervised\.processbench: files need names of their own"),
        (["kind=value", "supervised.processbench=[eval.json]"], r"supervised\.processbench: files need names of their own"),
        (["kind=prn"], r"kind: .*'prm'"),
        (["kind=[prm]"], r"kind: "),
        (["learner.critic=joint"], r"learner\.critic: 'joint' is the head of kind prm and value"),
        (["kind=prm", "supervised.epoch=2"], r"supervised\.epoch: unknown key; did you mean supervised\.epochs"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_a_kind_has_its_own_critic() -> None:
    assert (load_config(None, ["kind=prm"]).learner.critic, load_config(None, ["kind=sft"]).learner.critic) == ("joint", "none")
    assert load_config(None, ["kind=prm"]).learner.critic_hidden == ()
    assert load_config(None, ["kind=value", "learner.critic_hidden=[8]"]).learner.critic_hidden == (8,)


@pytest.mark.slow
@pytest.mark.long
def test_from_the_command_line_to_an_evaluated_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = write_examples(tmp_path / "a.jsonl", make_examples(40))
    config = job(tmp_path, tiny_model_dir, supervised={"data": [str(data)], "held_out_fraction": 0.25, "max_steps": 2, "batch": 16})
    file = tmp_path / "job.yaml"
    file.write_text(to_yaml(config))

    def reasoner(*command: str) -> str:
        done = subprocess.run([sys.executable, "-m", "reasoner_ray.cli", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "finished after 2 of 2 steps" in reasoner("train", str(file))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = reasoner("eval", str(file), f"--model={tmp_path / 'run' / 'model'}")
    figures = dict(line.split(": ") for line in shown.splitlines())
    bench = tmp_path / "bench.jsonl"
    bench.write_text(json.dumps({"problem": "1 + 2", "steps": ["it is 3", "so 3"], "label": -1}) + "\n")
    told = reasoner("eval", str(file), f"--model={tmp_path / 'run' / 'model'}", f"supervised.processbench=[{bench}]")
    assert "bench/f1: " in told and "bench/correct_accuracy: " in told
    for name in ("loss", "auc", "accuracy", "steps"):
        assert float(figures[f"eval/{name}"]) == pytest.approx(records[-1][f"eval/{name}"], rel=1e-3), name
