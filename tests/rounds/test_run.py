"""The loop: phases in their order, none of them twice whatever happens, and folders that are another job's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from reasoner_ray.config import JobConfig, parse_config, to_yaml
from reasoner_ray.data.tasks import Item, Task
from reasoner_ray.errors import CheckpointError, ConfigError, DataError
from reasoner_ray.models import load_tokenizer
from reasoner_ray.plot import plot_runs
from reasoner_ray.rounds.plan import Work
from reasoner_ray.rounds.run import check_questions, choose_run, run_rounds
from reasoner_ray.trainer.metrics_log import read_jsonl
from reasoner_ray.trainer.tracking import Tracker
from tests.rounds.test_data import searched, solution, write

LATER = ["search", "policy", "value", "greedy", "searched"]


def job(folder: Path, model: Path, n: int = 2, **sections: Any) -> JobConfig:
    tree: dict[str, Any] = {
        "name": "loop",
        "kind": "rounds",
        "out": str(folder),
        "model": {"path": str(model)},
        "task": {"name": "arithmetic", "args": {"digits": 1}},
        "search": {"scorer": {"name": "prm"}, "items": 8},
        "tracking": {"wandb": "off", "terminal": "off"},
        "rounds": {"n": n},
    }
    return parse_config({**tree, **sections})


class Workers:
    """Runs of phases that leave what real ones leave; ``broken`` phases are broken off in their midst, the first time."""

    def __init__(self, *broken: str, right: float = 1.0) -> None:
        self.broken, self.right = list(broken), right
        self.began: list[tuple[str, str]] = []

    def as_workers(self) -> dict[Work, Any]:
        return {"search": self.search, "train": self.train, "label": self.train}

    def search(self, config: JobConfig, how: str) -> None:
        folder = config.run_dir / "search"
        self._begin(config, how, folder / "config.yaml")
        summary = {"accuracy": 0.25, "unsolved": 0, "cost": {"generated": 9, "prompt_computed": 3, "scorer": 0, "seconds": 0.5}}
        (folder / "summary.json").write_text(json.dumps(summary))
        write(folder / "results.jsonl", searched("q", solution(config.run_dir.parent.name, self.right), solution("w", 0.0, 9)))

    def train(self, config: JobConfig, how: str) -> None:
        for file in config.supervised.data:
            assert Path(file).is_file(), "what is learnt was gathered before"
        self._begin(config, how, config.run_dir / "checkpoints" / "step-000001" / "MANIFEST.json")
        write(config.run_dir / "metrics.jsonl", {"step": 0, "eval/loss": 2.0}, {"step": 3, "eval/loss": 1.0})
        model = config.run_dir / "model"
        model.mkdir()
        for file in Path(config.model.path).iterdir():
            (model / file.name).symlink_to(file.resolve())

    def _begin(self, config: JobConfig, how: str, mark: Path) -> None:
        name = f"{config.run_dir.parent.name[-1]}/{config.name}"
        self.began.append((name, how))
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text("{}")
        if name in self.broken:
            self.broken.remove(name)
            raise KeyboardInterrupt


def run(config: JobConfig, workers: Workers, *, resume: bool = False) -> dict[str, float]:
    tracker = Tracker(config, config.run_dir, resume=resume)
    return run_rounds(config, tracker, workers.as_workers())


def test_rounds_run_through_and_leave_a_record_each(tmp_path: Path, tiny_model_dir: Path) -> None:
    config, workers = job(tmp_path, tiny_model_dir), Workers()
    last = run(config, workers)
    expected = ["samples", "value", "greedy", "searched"], LATER, LATER
    assert workers.began == [(f"{number}/{name}", "overwrite") for number, names in enumerate(expected) for name in names]
    records = read_jsonl(config.run_dir / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2]
    assert last["eval/accuracy"] == records[2]["eval/accuracy"] == 0.25 and last["searched/tokens"] == 9
    assert last["policy/loss"] == 1.0 and last["policy/loss_before"] == 2.0 and last["search/any_right"] == 1.0
    assert [r.get("policy/paths") for r in records] == [None, 2.0, 3.0], "of all rounds; the plain samples' right path is one"
    assert last["value/paths"] == 4.0, "the wrong one is the same text each time"
    assert (config.run_dir / "model").resolve() == (config.run_dir / "round-02/policy/model").resolve()
    assert (config.run_dir / "judge/config.json").is_file(), "a folder that loads"
    assert not list(config.run_dir.glob("round-*/*/checkpoints")), "nothing goes on from them"
    assert plot_runs([config.run_dir], tmp_path / "curves.png") == ["eval/accuracy"]


@pytest.mark.parametrize("broken", ["0/samples", "1/policy", "2/searched"])
def test_a_killed_job_goes_on_inside_the_phase_that_was_broken_off(broken: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    config, workers = job(tmp_path, tiny_model_dir), Workers(broken)
    with pytest.raises(KeyboardInterrupt):
        run(config, workers)
    with (config.run_dir / "phases.jsonl").open("ab") as ledger:
        ledger.write(b'{"step": 2, "pha')  # killed while it wrote
    before = list(workers.began)
    assert before[-1] == (broken, "overwrite")
    run(config, workers, resume=True)
    assert workers.began[len(before)] == (broken, "resume"), "not from its beginning"
    again = [name for name, _ in workers.began[len(before) + 1 :]]
    assert not {name for name, _ in before} & set(again), "what had ended is not run again"
    assert len(workers.began) == 4 + 2 * 5 + 1
    assert [r["step"] for r in read_jsonl(config.run_dir / "metrics.jsonl")] == [0, 1, 2]


def test_a_finished_job_does_nothing_more_and_goes_on_with_more_rounds(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = job(tmp_path, tiny_model_dir, n=1)
    first = run(config, Workers())
    workers = Workers()
    assert run(config, workers, resume=True) == first and not workers.began
    run(job(tmp_path, tiny_model_dir, n=2), workers, resume=True)
    assert [name for name, _ in workers.began] == [f"2/{name}" for name in LATER]
    assert [r["step"] for r in read_jsonl(config.run_dir / "metrics.jsonl")] == [0, 1, 2]
    assert run(config, workers, resume=True) == first and len(workers.began) == 5, "with fewer rounds the record is theirs"
    assert [r["step"] for r in read_jsonl(config.run_dir / "metrics.jsonl")] == [0, 1]


def test_without_a_round_there_is_a_value_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    config, workers = job(tmp_path, tiny_model_dir, n=0), Workers()
    run(config, workers)
    assert [name for name, _ in workers.began] == [f"0/{name}" for name in ("samples", "value", "greedy", "searched")]
    assert (config.run_dir / "model").resolve() == tiny_model_dir.resolve()
    assert (config.run_dir / "judge").resolve() == (config.run_dir / "round-00/value/model").resolve()


def test_a_round_without_a_right_path_ends_the_job(tmp_path: Path, tiny_model_dir: Path) -> None:
    workers = Workers(right=0.0)
    with pytest.raises(DataError, match="found a right path"):
        run(job(tmp_path, tiny_model_dir), workers)
    assert workers.began[-1][0] == "1/search", "nothing was trained"


def test_a_folder_is_taken_up_again_only_by_its_own_job(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = job(tmp_path, tiny_model_dir)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        choose_run(config, "resume")
    config.run_dir.mkdir()
    file = config.run_dir / "config.yaml"
    file.write_text(to_yaml(config))
    assert choose_run(job(tmp_path, tiny_model_dir, n=5), "resume").rounds.n == 5
    with pytest.raises(ConfigError, match="made with another search; go on with its own settings"):
        choose_run(job(tmp_path, tiny_model_dir, search={"scorer": {"name": "prm"}, "items": 9}), "resume")
    with pytest.raises(ConfigError, match="exists"):
        choose_run(config, "error")
    file.write_text(yaml.safe_dump({"name": "loop", "kind": "sft"}))
    with pytest.raises(ConfigError, match="holds a job of kind sft"):
        choose_run(config, "resume")


class Overlapping(Task):
    """A training question that is held out under another name."""

    name = "overlapping"

    def train(self) -> list[Item]:
        return [Item(id="t0", prompt="1 + 1 =", answer="2"), Item(id="t1", prompt="2 + 2 =", answer="4")]

    def held_out(self) -> list[Item]:
        return [Item(id="h0", prompt="2 + 2 =", answer="4"), Item(id="h1", prompt="3 + 3 =", answer="6")]


class Apart(Overlapping):
    def held_out(self) -> list[Item]:
        return super().held_out()[1:]


def test_a_question_is_learnt_or_evaluated_never_both(tmp_path: Path, tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    config = job(tmp_path, tiny_model_dir)
    with pytest.raises(DataError, match="training item t1 is also held-out item h0"):
        check_questions(config, Overlapping(), tokenizer)
    check_questions(config, Apart(), tokenizer)
    more = write(tmp_path / "more.jsonl", {"prompt": "3 + 3 =", "answer": " 6"})
    phases = {"policy": {"supervised": {"data": [str(more)]}}}
    with pytest.raises(DataError, match=r"more\.jsonl, line 1 is also held-out item h1"):
        check_questions(job(tmp_path, tiny_model_dir, rounds={"phases": phases}), Apart(), tokenizer)
