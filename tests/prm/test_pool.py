"""Step models shared by many callers: batches, one caller's mistake, actors that are killed, and the scorers of a search."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from reasoner_ray.config import parse_config
from reasoner_ray.errors import ConfigError, ModelError, ScorerGaveUp, ScoringError
from reasoner_ray.learner.learner import Learner
from reasoner_ray.models import fingerprint
from reasoner_ray.prm.model import ProcessModel
from reasoner_ray.prm.pool import Batcher, StepModelPool, StepModelSpec, shared_pool
from reasoner_ray.scoring.step_scorers import STEP_SCORERS, StepScorerContext, score_steps
from reasoner_ray.steps import Partial
from tests.prm.conftest import make_examples


class SlowModel:
    """Scores a step by its number; waits until it is let go, so that a test sees what comes together."""

    def __init__(self) -> None:
        self.tokens = 0
        self.calls: list[int] = []
        self.go = threading.Event()

    def unknown(self, partials: Sequence[Partial]) -> int:
        return sum(len(p.ends) - 1 for p in partials)  # of each the first step is known, say

    def forget(self) -> None:
        raise AssertionError("nobody asked for it")

    def score(self, partials: Sequence[Partial]) -> list[list[float]]:
        assert self.go.wait(10)
        self.calls.append(len(partials))
        if any(666 in p.tokens for p in partials):
            raise ScoringError("token 666")
        self.tokens += sum(len(p.tokens) for p in partials) - 1  # one was known, say
        return [[float(len(p.ends)) for _ in p.ends] for p in partials]


def solution(steps: int, token: int = 9) -> Partial:
    partial = Partial.root([1])
    for _ in range(steps):
        partial = partial.then([token])
    return partial


def test_callers_share_batches() -> None:
    async def run() -> None:
        model = SlowModel()
        batcher = Batcher(model)
        first = asyncio.create_task(batcher.score([solution(1)]))
        await asyncio.sleep(0.05)  # it computes already, alone
        later = [asyncio.create_task(batcher.score([solution(n), solution(1)])) for n in (2, 3, 4)]
        await asyncio.sleep(0.05)
        model.go.set()
        assert await first == ([[1.0]], 1)
        results = await asyncio.gather(*later)
        assert [scores for scores, _ in results] == [[[float(n)] * n, [1.0]] for n in (2, 3, 4)]
        assert model.calls == [1, 6] and batcher.batches == 2
        shares = [tokens for _, tokens in results]
        assert 1 + sum(shares) == model.tokens, "shares of the cost add up to what was computed"
        assert shares == [2, 5, 10], "of 17, by what was new of each (1, 2 and 3); the rest to who had most of it"

    asyncio.run(run())


def test_one_callers_mistake_is_its_own() -> None:
    async def run() -> None:
        model = SlowModel()
        batcher = Batcher(model)
        tasks = [asyncio.create_task(batcher.score([solution(1, token)])) for token in (9, 666, 9)]
        await asyncio.sleep(0.05)
        model.go.set()
        good, bad, also = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(bad, ScoringError)
        assert isinstance(good, tuple) and isinstance(also, tuple) and good[0] == also[0] == [[1.0]]
        assert (await batcher.score([solution(2)]))[0] == [[2.0, 2.0]], "and it goes on"

    asyncio.run(run())


def test_a_pool_outlives_another_callers_failure() -> None:
    """Threads share a pool: one that loses its actors empties the list under the others."""
    pool = StepModelPool(StepModelSpec(model="m", policy="m"))

    class Actor:
        def __init__(self) -> None:
            self.score = self

        def remote(self, partials: list[Partial]) -> Any:
            done: Future[Any] = Future()
            done.set_result(([[float(len(p.ends))] * len(p.ends) for p in partials], 1))
            return SimpleNamespace(future=lambda: done)

    class Slow(list[Partial]):
        def __iter__(self) -> Iterator[Partial]:
            pool._actors = []
            return super().__iter__()

    pool._actors = [Actor(), Actor()]
    assert asyncio.run(pool.score(Slow([solution(2)]))) == ([[2.0, 2.0]], 1)


def test_a_model_that_hangs_is_given_up(tiny_model_dir: Path) -> None:
    pool = StepModelPool(StepModelSpec(model="m", policy="m"))
    never: Any = SimpleNamespace(score=SimpleNamespace(remote=lambda partials: SimpleNamespace(future=Future)))
    pool._actors = [never]
    with pytest.raises(ScorerGaveUp, match=r"gave no scores within 0\.05 s; .*timeout_s"):
        asyncio.run(pool.score([solution(1)], 0.05))
    context: Any = StepScorerContext(config=parse_config({"model": {"path": "m"}}), engine=None, tokenizer=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"args\.timeout_s must be above 0"):
        STEP_SCORERS.get("prm")(context, model="m", timeout_s=0)


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"workers": "two"}, {"tokens_per_microbatch": 0}, {"kept_tokens": -1}])
def test_impossible_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"args\.{next(iter(wrong))} must be a whole number"):
        StepModelSpec(model="m", policy="m", **wrong)


class AskedEngine:
    """Says yes to what it is asked with log-odds of the prompt's length modulo 3."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    async def next_logprobs(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
        self.asked.append(list(prompt))
        assert len(tokens) == 2
        return [float(len(prompt) % 3), 0.0]


def test_the_policy_judges_itself(tiny_model_dir: Path) -> None:
    tokenizer, engine = AutoTokenizer.from_pretrained(tiny_model_dir), AskedEngine()
    config = parse_config({"model": {"path": str(tiny_model_dir)}})
    context: Any = StepScorerContext(config=config, engine=engine, tokenizer=tokenizer)  # type: ignore[arg-type]
    judge = STEP_SCORERS.get("judge")(context, yes="a", no="b")
    partial = Partial.root(tokenizer.encode("2 + 3?")).then(tokenizer.encode("add\n")).then(tokenizer.encode("5\n"))

    async def run() -> None:
        scores = await score_steps(judge, [partial, partial.until(1)])
        assert scores[0][:1] == scores[1] and len(engine.asked) == 2, "a step is asked about once"
        assert scores[0] == pytest.approx([1 / (1 + math.exp(-(len(asked) % 3))) for asked in engine.asked])
        assert judge.tokens == sum(map(len, engine.asked))
        await judge.score([Partial(partial.tokens, partial.ends[-1:], partial.start)])
        assert len(engine.asked) == 3, "the same tokens as one step are another question"

    asyncio.run(run())


@pytest.fixture(scope="module")
def prm_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A process reward model that was trained for a moment, so that its scores differ."""
    folder = tmp_path_factory.mktemp("prm")
    tree = {"kind": "prm", "model": {"path": str(tiny_model_dir), "dtype": "float32"}, "learner": {"lr": 1e-3, "critic_lr": 1e-2}}
    config = parse_config(tree)
    learner = Learner(config)
    for _ in range(3):
        learner.train_step([[e.trajectory("prm", config.supervised) for e in make_examples(8)]])
    learner.export(folder / "model")
    return folder / "model"


def test_what_a_model_knows_of_solutions_and_that_it_can_forget(prm_dir: Path) -> None:
    model = ProcessModel(str(prm_dir), dtype="float32")
    partial = next(e.partial for e in make_examples(12) if len(e.partial.ends) > 1)
    assert model.unknown([partial, partial.until(1)]) == len(partial.tokens) + len(partial.until(1).tokens)
    first = model.score([partial.until(1)])
    computed = model.tokens
    assert computed == len(partial.until(1).tokens)
    assert model.unknown([partial]) == len(partial.tokens) - partial.ends[0]
    model.score([partial.until(1)])
    assert model.tokens == computed, "known"
    model.forget()
    assert model.unknown([partial.until(1)]) == computed
    assert model.score([partial.until(1)]) == first and model.tokens == 2 * computed


@pytest.mark.long
def test_actors_are_shared_batched_and_survive_a_kill(prm_dir: Path, tiny_model_dir: Path, ray_cluster: Any) -> None:
    spec = StepModelSpec(model=str(prm_dir), policy=str(tiny_model_dir), dtype="float32", workers=2, threads=1)
    partials = [e.partial for e in make_examples(12)]
    expected = ProcessModel(str(prm_dir), dtype="float32").score(partials)

    async def run() -> None:
        pool, other = StepModelPool(spec), StepModelPool(spec)
        scores, tokens = await pool.score(partials)
        assert all(one == pytest.approx(two, abs=1e-5) for one, two in zip(scores, expected, strict=True)) and tokens > 0
        again, none = await other.score(partials)
        assert again == scores and none == 0, "another handle finds the same actors, and what they know"
        for actor in pool._actors:
            os.kill(ray_cluster.get(actor.ping.remote()), signal.SIGKILL)
        scores, tokens = await pool.score(partials)
        assert all(one == pytest.approx(two, abs=1e-5) for one, two in zip(scores, expected, strict=True))
        assert tokens > 0, "a restarted actor has forgotten"
        await pool.stop()
        assert (await other.score(partials[:2]))[0] == scores[:2], "and one that was taken away is started anew"
        await other.stop()

    asyncio.run(run())


def test_a_pool_looks_whether_its_model_was_written_anew(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("one")
    pool = StepModelPool(StepModelSpec(model=str(tmp_path), policy="p"))
    pool.look()
    assert pool._actors == [], "nothing was loaded yet"
    pool._actors, pool._folder, pool._version = ["actor"], tmp_path, fingerprint(tmp_path)
    pool.look()
    assert pool._actors == ["actor"] and pool._outdated == []
    (tmp_path / "weights").write_text("two and more")
    pool.look()
    assert pool._actors == [] and pool._outdated == ["actor"]


@pytest.mark.slow
@pytest.mark.long
def test_a_folder_that_is_written_anew_is_scored_anew(prm_dir: Path, tiny_model_dir: Path, tmp_path: Path, ray_cluster: Any) -> None:
    """Without it a refreshed model would be asked for its scores of before until the session ends."""
    folder = tmp_path / "model"
    shutil.copytree(prm_dir, folder)
    config = parse_config({"model": {"path": str(tiny_model_dir), "dtype": "float32"}})
    context: Any = StepScorerContext(config=config, engine=None, tokenizer=None)  # type: ignore[arg-type]
    partials = [e.partial for e in make_examples(3)]

    async def ask() -> tuple[list[list[float]], int]:
        scorer = STEP_SCORERS.get("prm")(context, model=str(folder), dtype="float32", threads=1)
        return await score_steps(scorer, partials), scorer.tokens

    def actors() -> int:
        return sum("step-model" in actor["name"] for actor in ray_cluster.util.list_named_actors(all_namespaces=True))

    before = actors()

    async def story() -> None:
        first, _ = await ask()
        again, tokens = await ask()
        assert again == first and tokens == 0, "the same folder, the same actors, which remember"
        weights = load_file(folder / "step_head.safetensors")
        save_file({name: -tensor for name, tensor in weights.items()}, folder / "step_head.safetensors")
        turned, tokens = await ask()
        assert tokens > 0
        for old, new in zip(first, turned, strict=True):
            assert new == pytest.approx([1 - score for score in old], abs=1e-4), "a logit of the other sign"
        assert actors() == before + 1, "the old one holds no memory any more"
        await shared_pool(StepModelSpec(model=str(folder), policy=str(tiny_model_dir), dtype="float32", threads=1)).stop()

    asyncio.run(story())


def test_a_fingerprint_is_of_what_lies_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    weights = tmp_path / "a" / "weights"
    weights.write_text("one")
    first = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "a") == first
    os.utime(weights, ns=(1, 1))
    assert fingerprint(tmp_path / "a") != first, "written again"
    (tmp_path / "blobs").mkdir()
    for name in ("b", "c"):  # two nodes' copies of a hub's snapshot: links to files named for their content
        (tmp_path / name).mkdir()
        (tmp_path / "blobs" / f"{name}-node").mkdir()
        blob = tmp_path / "blobs" / f"{name}-node" / "0123abcd"
        blob.write_text("x")
        os.utime(blob, ns=(2, len(name) + ord(name)))
        (tmp_path / name / "weights").symlink_to(blob)
    assert fingerprint(tmp_path / "b") == fingerprint(tmp_path / "c")


@pytest.mark.slow
def test_what_keeps_an_actor_from_starting_is_told(tiny_model_dir: Path, ray_cluster: Any) -> None:
    pool = StepModelPool(StepModelSpec(model=str(tiny_model_dir), policy=str(tiny_model_dir)))
    with pytest.raises(ModelError, match=r"set the scorer's args\.format"):
        asyncio.run(pool.score([solution(1)]))


@pytest.mark.slow
def test_prm_is_a_step_scorer(prm_dir: Path, tiny_model_dir: Path, ray_cluster: Any) -> None:
    config = parse_config({"model": {"path": str(tiny_model_dir), "dtype": "float32"}})
    context: Any = StepScorerContext(config=config, engine=None, tokenizer=None)  # type: ignore[arg-type]
    scorer = STEP_SCORERS.get("prm")(context, model=str(prm_dir), dtype="float32", threads=1)
    partials = [e.partial for e in make_examples(3)]
    scores = asyncio.run(score_steps(scorer, partials))
    assert [len(s) for s in scores] == [len(p.ends) for p in partials]
    assert scorer.tokens > 0
