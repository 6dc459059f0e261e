"""A run of searches: many at once, each item once whatever happens, and what it says in the end."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from reasoner_ray.cli import app
from reasoner_ray.config import JobConfig, load_config, parse_config
from reasoner_ray.data.tasks import Item, get_task
from reasoner_ray.errors import CheckpointError, ConfigError, DataError, ScoringError
from reasoner_ray.rounds.figures import search_figures
from reasoner_ray.search.results import ResultsFile, make_record, read_results, recorded_samples, show, summarise_results
from reasoner_ray.search.run import SearchRun, calibrate_stopping, new_name, prepare_folder, search, search_items, standing
from reasoner_ray.trainer.launch import IfExists
from reasoner_ray.trainer.parts import GroupResult
from reasoner_ray.trajectory import Trajectory, TrajectoryBuilder

ITEMS = [Item(id=f"q{i}", prompt="p", answer="2") for i in range(12)]
COST = {"generated": 8, "discarded": 1, "prompt": 20, "prompt_computed": 5, "scorer": 0, "requests": 2, "cut": 0, "seconds": 0.5}


def solution(answer: str, group: int, value: float, found_at: list[int]) -> dict[str, Any]:
    return {"answer": answer, "group": group, "value": value, "scores": [value], "steps": 1, "found_at": found_at}


def trajectory(name: str, **info: Any) -> Trajectory:
    builder = TrajectoryBuilder(id=name, group_id=name, task="t")
    builder.add_env([1])
    builder.add_model([2, 3], [-1.0, -1.0], [0, 0])
    return builder.build(text="2", **info)


def found(item: Item) -> list[Trajectory]:
    about = {"answer": "2", "confidence": 0.75, "ended": "done", "found": 3, "nodes": 4, "cost": COST, "answers": [0, 1, 0]}
    about["cut_samples"] = []
    tree = {"tree": {"item": item.id}}
    return [
        trajectory("a", solution=solution("2", 0, 0.9, [0, 2]), search={**about, **tree}),
        trajectory("b", solution=solution("5", 1, 0.95, [1])),
    ]


class Pools:
    """Rollouts and scorers at once; ``broken`` items raise, so do ``long`` ones; the first answer is right and the second wrong."""

    def __init__(self, broken: Sequence[str] = (), long: Sequence[str] = ()) -> None:
        self.broken, self.long, self.asked = broken, long, []  # type: ignore[var-annotated]
        self.at_once = self.most = 0

    def submit(self, item: Item, group_id: str, n: int) -> Item:
        assert (group_id, n) == (f"search-{item.id}", 1)
        self.asked.append(item.id)
        return item

    async def finish(self, call: Item) -> GroupResult:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0.001)
        self.at_once -= 1
        if call.id in self.broken:
            raise ScoringError("one score too few")
        if call.id in self.long:
            raise DataError(f"item {call.id}: its prompt has 900 tokens")
        return GroupResult(trajectories=found(call), summary={})

    async def score(self, result: GroupResult, item: Item) -> GroupResult:
        return GroupResult(trajectories=result.trajectories, summary={"rewards": [1.0, 0.0]})

    async def fetch(self, result: GroupResult) -> Any:
        return result.trajectories, result.summary


def run(pools: Pools, path: Path, items: list[Item] = ITEMS, **others: Any) -> None:
    with ResultsFile(path) as file:
        asyncio.run(SearchRun(pools, pools, file, in_flight=5, **others).run(items))


def test_every_item_has_one_line_and_no_more_are_under_way_than_allowed(tmp_path: Path) -> None:
    pools, seen = Pools(), []  # type: ignore[var-annotated]
    run(pools, tmp_path / "r.jsonl", trees=tmp_path / "trees", on_result=seen.append)
    records = read_results(tmp_path / "r.jsonl")
    assert sorted(r["id"] for r in records) == sorted(i.id for i in ITEMS) and len(seen) == 12
    assert pools.most == 5
    assert records[0]["correct"] == 1.0 and [s["correct"] for s in records[0]["solutions"]] == [1.0, 0.0]
    assert "tree" not in records[0]
    assert json.loads((tmp_path / "trees" / "00003.json").read_text()) == {"item": "q3"}


def test_an_error_ends_the_run_and_what_was_found_is_not_searched_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(ScoringError, match="one score too few"):
        run(Pools(broken=["q7"]), path)
    before = [r["id"] for r in read_results(path)]
    assert before and "q7" not in before
    with path.open("ab") as file:
        file.write(b'{"id": "q11", "corr')  # killed while it wrote
    again = Pools()
    run(again, path)
    assert not set(again.asked) & set(before)
    ids = [r["id"] for r in read_results(path)]
    assert sorted(ids) == sorted(i.id for i in ITEMS), "none lost, none twice"


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run(Pools(), path, ITEMS[:2])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{oops", lines[1]]) + "\n")
    with pytest.raises(DataError, match=r"r\.jsonl:2: not a line of JSON"):
        ResultsFile(path)
    path.write_text(lines[0] + '\n{"id": "q1"}\n')
    with pytest.raises(DataError, match=r"r\.jsonl:2: not a result"):
        read_results(path)
    with pytest.raises(DataError, match="no results at"):
        read_results(tmp_path / "none.jsonl")


def test_the_summary_by_hand() -> None:
    right = make_record(0, ITEMS[0], found(ITEMS[0]), [1.0, 0.0])
    wrong = make_record(1, ITEMS[1], found(ITEMS[1]), [0.0, 1.0])
    unjudged = make_record(2, ITEMS[2], found(ITEMS[2]), [float("nan"), 0.0])
    summary = summarise_results([right, wrong, unjudged])
    assert (summary["items"], summary["unjudged"], summary["accuracy"], summary["solutions"]) == (3, 1, 0.5, 3)
    assert summary["standard_error"] == pytest.approx(0.5 / 2**0.5)
    assert summary["cost"]["prompt_computed"] == 5 and summary["ended"] == {"done": 3}
    # Votes: 1.8 against .95 and 2 against 1 for the first answer; the most valuable solution is the second's.
    assert summary["accuracy_by"]["last/vote"] == summary["accuracy_by"]["majority"] == 0.5
    assert summary["accuracy_by"]["last/max"] == 0.5
    by_hand = summarise_results([right])["accuracy_by"]
    assert by_hand["last/vote"] == 1.0 and by_hand["last/max"] == 0.0
    shown = show(summary)
    assert "50.0% ± 35.4% of 3 items" in shown and "not judged" in shown and "8, 1 of them discarded" in shown
    with pytest.raises(DataError, match="no result"):
        summarise_results([])


def test_what_is_right_is_what_the_job_says() -> None:
    """A weighted sum is hardly ever 1: with a term for the form a right answer earns 1.1, and a wrong one of that form .1."""
    records = [make_record(i, ITEMS[i], found(ITEMS[i]), [reward, 0.0]) for i, reward in enumerate((1.1, 0.1))]
    records[1]["confidence"] = 0.25
    summary = summarise_results(records)
    assert (summary["confidence_right"], summary["confidence_wrong"], summary["right"]) == (0.75, 0.25, 0.5)
    assert summary["accuracy"] == pytest.approx(0.6), "the mean reward, as ever"
    assert "50.0% of the answers judged" in show(summary)
    half = [make_record(0, ITEMS[0], found(ITEMS[0]), [0.5, 0.0])]
    assert summarise_results(half)["right"] == 0 and summarise_results(half, right_from=0.5)["right"] == 1
    assert [s.correct for s in recorded_samples(records)] == [(True, False, True), (False, False, False)]
    assert recorded_samples(half, right_from=0.5)[0].correct == (True, False, True)


def test_a_question_that_cannot_be_asked_is_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run(Pools(long=["q3"]), path)
    records = read_results(path)
    assert sorted(r["id"] for r in records) == sorted(i.id for i in ITEMS)
    (failed,) = (r for r in records if r["id"] == "q3")
    assert failed["correct"] is None and failed["ended"] == "failed" and "900 tokens" in failed["problem"]
    again = Pools()
    run(again, path)
    assert again.asked == [], "it is not asked again"
    summary = summarise_results(records)
    assert (summary["items"], summary["failed"], summary["unjudged"], summary["unsolved"]) == (12, 1, 1, 0)
    assert summary["cost"]["generated"] == 8 and summary["accuracy"] == 1 and summary["ended"] == {"done": 11, "failed": 1}
    assert "1, of which 1 searches failed" in show(summary) and "accuracy 100.0%" in standing(records)
    nothing = summarise_results([failed])
    assert "accuracy" not in nothing and nothing["failed"] == 1 and show(nothing)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    figures = search_figures(tmp_path, judged=True)
    assert figures["failed"] == 1 and figures["any_right"] == 1.0, "of those that were searched on"


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    folder = prepare_folder(config, "error")
    with ResultsFile(folder / "results.jsonl") as file:
        file.append(make_record(0, ITEMS[0], found(ITEMS[0]), [1.0, 0.0]))
        with pytest.raises(CheckpointError, match="in use: another process is writing it"):
            ResultsFile(folder / "results.jsonl")
        settings = (folder / "config.yaml").read_text()
        ways: tuple[IfExists, ...] = ("overwrite", "resume")
        for how in ways:
            with pytest.raises(CheckpointError, match="in use: another process is writing it"):
                prepare_folder(config_in(tmp_path, "search.items=99"), how)
        assert (folder / "config.yaml").read_text() == settings
    assert len(read_results(folder / "results.jsonl")) == 1
    prepare_folder(config, "overwrite")
    assert not (folder / "results.jsonl").exists()


def test_an_item_that_has_two_lines_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run(Pools(), path, ITEMS[:2])
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match=r"r\.jsonl:3: item 'q\d' has line 1 already; remove one"):
        read_results(path)


def test_calibration_takes_whole_runs_alone_and_says_where_they_were_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [make_record(i, ITEMS[i], found(ITEMS[i]), [1.0, 0.0]) for i in range(4)]
    for record, ended in zip(records, ("done", "settled", "generated", "failed"), strict=True):
        record["ended"] = ended
    with pytest.raises(DataError, match=r"2 of 4 recorded searches stopped early \(generated 1, settled 1\).*search\.stopping=null"):
        recorded_samples(records)
    assert len(recorded_samples([records[0], records[3] | {"correct": None}])) == 1
    cut = records[0] | {"cost": {**COST, "cut": 1}}
    del cut["cut_samples"]
    with pytest.raises(DataError, match="recorded without the samples that a limit cut"):
        recorded_samples([cut])
    config = config_in(tmp_path, "search.method=self_consistency", "search.settings={wave: 1}")
    for split in ("train", "held_out"):
        folder = prepare_folder(config_in(tmp_path, f"name={split}", f"search.split={split}"), "error")
        run(Pools(), folder / "results.jsonl")
        caplog.clear()
        calibrate_stopping(config, folder / "results.jsonl", 0.01)
        assert ("holds held-out questions" in caplog.text) == (split == "held_out")


def config_in(folder: Path, *overrides: str) -> JobConfig:
    return load_config(None, ["name=t", f"out={folder}", *overrides])


@pytest.mark.parametrize(("temperature", "told"), [(1.0, False), (0.6, False), (0.7, True)])
def test_a_temperature_that_searches_do_not_read_is_told(
    tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture, temperature: float, told: bool
) -> None:
    model, task = f"model.path={tiny_model_dir}", "task={name: arithmetic}"
    config = config_in(tmp_path, model, task, f"rollout.temperature={temperature}", "search.temperature=0.6")
    prepare_folder(config, "error")
    with pytest.raises(ConfigError, match="exists"):  # before anything starts
        search(config)
    assert ("says nothing to them" in caplog.text) == told


def test_a_folder_is_taken_up_again_only_by_the_same_search(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    folder = prepare_folder(config, "error")
    (folder / "results.jsonl").write_text("kept")
    with pytest.raises(ConfigError, match=r"exists\. Go on with --resume"):
        prepare_folder(config, "error")
    assert prepare_folder(config_in(tmp_path, "trainer.steps=99"), "resume") == folder, "what a search does not read may differ"
    assert prepare_folder(config_in(tmp_path, "search.items=99"), "resume") == folder, "and there may be more items"
    with pytest.raises(ConfigError, match=r"made with another search: see"):
        prepare_folder(config_in(tmp_path, "search.method=beam"), "resume")
    with pytest.raises(ConfigError, match=r"made with another seed, task"):
        prepare_folder(config_in(tmp_path, "seed=3", "task.args={digits: 1}"), "resume")
    assert (folder / "results.jsonl").exists()
    assert new_name(config).name == "t-2"
    prepare_folder(config, "overwrite")
    assert not (folder / "results.jsonl").exists()


def test_items_are_those_of_the_split_and_must_be_told_apart() -> None:
    class Twice:
        name = "twice"

        def train(self) -> list[Item]:
            return [ITEMS[0], ITEMS[0]]

        def held_out(self) -> list[Item]:
            return []

    with pytest.raises(DataError, match="no held_out items"):
        search_items(parse_config({"name": "t"}), Twice())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="share an id"):
        search_items(parse_config({"name": "t", "search": {"split": "train"}}), Twice())  # type: ignore[arg-type]
    assert len(search_items(parse_config({"name": "t", "search": {"split": "train", "items": 1}}), Twice())) == 1  # type: ignore[arg-type]


def test_the_command_line_lists_calibrates_and_refuses(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["search", "--list"])
    assert listed.exit_code == 0 and "mcts_alpha" in listed.stdout and "c_init=3.0" in listed.stdout
    run(Pools(), tmp_path / "r.jsonl")
    job = tmp_path / "job.yaml"
    for wave, saved in (("{wave: 1}", "0.3333"), ("{}", "0")):
        job.write_text(f"name: t\nsearch: {{method: self_consistency, settings: {wave}}}\n")
        calibrated = CliRunner().invoke(app, ["search", str(job), "--calibrate", str(tmp_path / "r.jsonl")])
        assert calibrated.exit_code == 0, calibrated.output
        # Three solutions an item, the first right: one never is enough (least 2), two are: a third of the tokens. The method itself
        # takes four at once: there is nothing to save.
        assert "fixed_accuracy: 1" in calibrated.stdout and f"tokens_saved: {saved}\n" in calibrated.stdout
    assert CliRunner().invoke(app, ["search"]).exit_code == 2
    assert CliRunner().invoke(app, ["search", str(job), "--if-exists", "sometimes"]).exit_code == 2


@pytest.mark.slow
@pytest.mark.long
def test_a_search_that_was_begun_goes_on_from_the_command_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Real Ray and vLLM; a random model, whose solutions are two tokens a step until a common letter."""
    path = tmp_path / "job.yaml"
    tree = {
        "name": "s",
        "out": str(tmp_path / "runs"),
        "model": {"path": str(tiny_model_dir), "dtype": "float32"},
        "task": {"name": "arithmetic", "args": {"digits": 1, "shots": 1}},
        "rollout": {"max_new_tokens": 16, "max_context": 64, "kv_cache_gb": 0.1, "cpus": 0, "stop": ["a", "e", "i"]},
        "search": {"method": "mcts", "separator": 2, "items": 6, "save_trees": True},
    }
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path)
    folder = prepare_folder(
        config.model_copy(update={"rollout": config.rollout.model_copy(update={"episode": "search_solutions"})}), "error"
    )
    task = get_task(config.task, config.seed)
    begun = task.held_out()[:2]
    run(Pools(), folder / "results.jsonl", begun)
    with (folder / "results.jsonl").open("ab") as file:
        file.write(b'{"id": "cut')
    command = [sys.executable, "-m", "reasoner_ray.cli", "search", str(path), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "items 2/6" in done.stdout and "items 6/6" in done.stdout and "generated tokens" in done.stdout
    records = read_results(folder / "results.jsonl")
    assert sorted(r["id"] for r in records) == sorted(item.id for item in task.held_out()[:6])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["items"] == 6 and summary["method"] == "mcts" and summary["session_s"] > 0
    drawn = CliRunner().invoke(app, ["plot", str(folder / "trees" / "00005.json")])
    assert drawn.exit_code == 0 and (folder / "trees" / "00005.png").is_file(), drawn.output
