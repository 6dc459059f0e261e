"""`reasoner eval` of a process reward or value model: held-out step labels, and the first errors of ProcessBench."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import ray

from reasoner_ray.data.records import Record, read_records
from reasoner_ray.errors import ConfigError, DataError
from reasoner_ray.models import load_tokenizer, resolve_model
from reasoner_ray.prm.examples import Example, encode_steps, read_examples, render_prompt, split, target_of, value_targets
from reasoner_ray.prm.judge import judge_args
from reasoner_ray.prm.metrics import first_error, first_error_metrics, step_metrics, value_metrics
from reasoner_ray.registry import check_arguments
from reasoner_ray.steps import Partial
from reasoner_ray.trainer import launch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.config import JobConfig
    from reasoner_ray.prm.examples import Kind
    from reasoner_ray.prm.settings import SupervisedConfig

_AT_ONCE = 32  # solutions of a call: enough to fill a batch, few enough to be spread over actors


class ScoresSteps(Protocol):
    """What an evaluation needs of a pool of step models."""

    async def score(self, partials: Sequence[Partial]) -> tuple[list[list[float]], int]:
        """Scores of the steps, and the tokens computed for them."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """A solution of ProcessBench."""

    partial: Partial
    first_error: int  # index of the first wrong step, -1 for none


def evaluate(config: JobConfig) -> dict[str, float]:
    """Figures of the model ``config.model`` on the job's held-out labels and its ProcessBench files, with counts.

    Raises ``ReasonerError`` with what to do.
    """
    from reasoner_ray.prm.pool import StepModelPool, StepModelSpec
    from reasoner_ray.trainer.supervised import kind_of

    kind, settings = kind_of(config), config.supervised
    tokenizer = load_tokenizer(resolve_model(config.model.path), trust_remote_code=config.model.trust_remote_code)
    examples = held_out_examples(settings, kind, tokenizer)
    benches = {Path(name).name.split(".")[0]: read_processbench(name, settings, tokenizer) for name in settings.processbench}
    if not examples and not benches:
        raise ConfigError("nothing to evaluate on: set supervised.data, supervised.held_out or supervised.processbench")
    launch.connect(config)
    try:
        check_arguments(StepModelSpec, settings.scorer, "supervised.scorer", reserved=("model", "policy"))
        path = config.model.path
        args = {"dtype": config.model.dtype, "kept_tokens": 0} | (judge_args(settings) if settings.head == "judge" else settings.scorer)
        pool = StepModelPool(StepModelSpec(model=path, policy=path, **args))
        return asyncio.run(evaluate_model(pool, kind, settings, examples, benches))
    finally:
        ray.shutdown()


async def evaluate_model(
    pool: ScoresSteps, kind: Kind, settings: SupervisedConfig, examples: Sequence[Example], benches: dict[str, tuple[list[Judged], int]]
) -> dict[str, float]:
    """The figures, by name: ``eval/...`` of the labelled examples, ``NAME/...`` of each of ``benches``."""
    figures: dict[str, float] = {}
    if examples:
        found, tokens = await _score(pool, [e.partial for e in examples])
        figures |= {f"eval/{name}": value for name, value in _example_metrics(kind, settings, examples, found).items()}
        figures["eval/tokens"] = float(tokens)
    for name, (judged, left_out) in benches.items():
        found, tokens = await _score(pool, [j.partial for j in judged])
        firsts = [first_error(scores, settings.threshold) for scores in found]
        figures |= {f"{name}/{key}": value for key, value in first_error_metrics(firsts, [j.first_error for j in judged]).items()}
        figures |= {f"{name}/left_out": float(left_out), f"{name}/tokens": float(tokens)}
    return figures


def held_out_examples(settings: SupervisedConfig, kind: Kind, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The labelled solutions that a job does not learn from. Raises ``DataError``."""
    if settings.held_out:
        return read_examples(settings.held_out, kind, settings, tokenizer)[0]
    if not settings.data:
        return []
    return split(read_examples(settings.data, kind, settings, tokenizer)[0], settings.held_out_fraction)[1]


def read_processbench(name: str, settings: SupervisedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Judged], int]:
    """The solutions of a file in ProcessBench's format (a JSON array or JSON lines), and how many were too long.

    A record has ``problem``, ``steps`` and ``label``, the index of the first wrong step or -1. Raises ``DataError`` naming the
    file and the record.
    """
    judged, left_out = [], 0
    for record in _records(Path(name).expanduser()):
        steps, label = record.get("steps"), record.get("label")
        if not (isinstance(steps, list) and steps and all(isinstance(s, str) and s for s in steps)):
            raise DataError(f"{record.where}: 'steps' must be a list of non-empty texts (got {steps!r:.80})")
        if not (isinstance(label, int) and -1 <= label < len(steps)):
            raise DataError(f"{record.where}: 'label' must be the index of one of {len(steps)} steps, or -1 (got {label!r:.80})")
        prompt = render_prompt(record.text("problem"), settings.chat, tokenizer, record.where)
        texts = [step + settings.separator for step in steps[:-1]] + [steps[-1]]
        partial = encode_steps(prompt, texts, tokenizer, end_of_text=settings.end_of_text)
        if len(partial.tokens) > settings.max_tokens:
            left_out += 1
        else:
            judged.append(Judged(partial, label))
    if not judged:
        raise DataError(f"{name}: no solution has at most supervised.max_tokens={settings.max_tokens} tokens")
    return judged, left_out


def _records(file: Path) -> list[Record]:
    """The records of a JSON array, or of whatever ``read_records`` reads."""
    if not file.is_file() or ".json" not in file.suffixes:
        return read_records(file)
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as stream:
            content: Any = json.load(stream)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{file} is not a readable JSON array: {error}") from error
    if not (isinstance(content, list) and content and all(isinstance(entry, dict) for entry in content)):
        raise DataError(f"{file} must hold a JSON array of records")
    return [Record(f"{file}, record {i}", str(i), entry) for i, entry in enumerate(content)]


async def _score(pool: ScoresSteps, partials: Sequence[Partial]) -> tuple[list[list[float]], int]:
    parts = [partials[i : i + _AT_ONCE] for i in range(0, len(partials), _AT_ONCE)]
    results = await asyncio.gather(*(pool.score(part) for part in parts))
    return [scores for found, _ in results for scores in found], sum(tokens for _, tokens in results)


def _example_metrics(
    kind: Kind, settings: SupervisedConfig, examples: Sequence[Example], found: Sequence[Sequence[float]]
) -> dict[str, float]:
    if kind == "prm":
        pairs = [(s, y) for e, scores in zip(examples, found, strict=True) for s, y in zip(scores, e.labels, strict=True) if y is not None]
        labels = np.array([target_of(y, settings) for _, y in pairs])
        return step_metrics(np.array([s for s, _ in pairs]), labels, settings.threshold)
    # A step model scores steps: the value at the question's end, which training also fits, is not among them.
    targets = [z for e in examples for z in value_targets(e.reward or 0.0, len(e.partial.ends), settings.gamma)[1:]]
    return value_metrics(np.array([s for scores in found for s in scores]), np.array(targets))
