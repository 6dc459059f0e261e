"""From finished trajectories to rewarded ones: decode the answers, have them judged, put the rewards on the tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from reasoner_ray.scoring.base import Answer, RewardTerms, Score
from reasoner_ray.scoring.graders import GraderPool
from reasoner_ray.trainer.terminal import SampleRow
from reasoner_ray.trajectory import Status, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.data.tasks import Item
    from reasoner_ray.scoring.process_reward import ProcessReward

_SHOWN_PROMPT, _SHOWN_ANSWER = 500, 2000  # characters of a sample kept for the table of rollouts


@dataclass(frozen=True, slots=True)
class _Judged:
    trajectory: Trajectory
    text: str
    score: Score | None  # None where nothing had to be judged


class Scorer:
    """Judges groups of trajectories. Thread-safe: several groups share the grader processes."""

    def __init__(
        self,
        reward: RewardTerms,
        tokenizer: PreTrainedTokenizerBase,
        *,
        processes: int = 1,
        timeout_s: float = 10.0,
        process: ProcessReward | None = None,
    ) -> None:
        """Start the grader processes (none where the environment alone rewards). Raises ``ReasonerError``."""
        self._process = process
        self._reward = reward
        self._tokenizer = tokenizer
        self._graders = GraderPool(reward.terms, processes=processes, timeout_s=timeout_s) if reward.terms else None

    @property
    def counts(self) -> dict[str, int]:
        """Answers by outcome, and restarts of grader processes, so far."""
        return self._graders.counts if self._graders else {}

    def close(self) -> None:
        """End the grader processes."""
        if self._graders is not None:
            self._graders.close()

    def score_group(self, trajectories: Sequence[Trajectory], item: Item) -> tuple[list[Trajectory], dict[str, Any]]:
        """The group with its outcome rewards, and a summary for the driver.

        A trajectory whose answer could not be judged comes back FAILED, without a reward. The summary holds, a
        trajectory each: ``rewards`` (NaN where failed), ``statuses``, ``lengths`` (trainable tokens), ``oldest_versions``;
        and ``parts`` (mean value of each term), ``metrics``, ``environment_failures`` and ``environment_errors`` (of the
        episodes), ``label`` (the item's), ``unscored`` (how many answers by error type), ``failed`` (whether any trajectory
        may not be trained on), ``error`` (why), ``samples`` (one ``SampleRow``); with process rewards what
        ``ProcessReward.apply`` says of them.
        """
        judged = self._judge(trajectories, item)
        rewarded = [self._rewarded(j) for j in judged]
        if self._process is None:
            return rewarded, _summary(judged, rewarded, item)
        rewarded, extra = self._process.apply(rewarded)
        summary = _summary(judged, rewarded, item)
        return rewarded, summary | extra | {"unscored": _total([summary["unscored"], extra["unscored"]])}

    def _judge(self, trajectories: Sequence[Trajectory], item: Item) -> list[_Judged]:
        texts = [decode_answer(t, self._tokenizer) for t in trajectories]
        futures = [
            self._graders.submit(_answer(t, text), item) if self._graders is not None and t.status.is_trainable else None
            for t, text in zip(trajectories, texts, strict=True)
        ]
        return [_Judged(t, x, f.result() if f else None) for t, x, f in zip(trajectories, texts, futures, strict=True)]

    def _rewarded(self, judged: _Judged) -> Trajectory:
        trajectory, score = judged.trajectory, judged.score
        if self._reward.environment_weight != 1.0:
            trajectory = replace(trajectory, rewards=trajectory.rewards * np.float32(self._reward.environment_weight))
        if score is None:
            return trajectory
        if score.status != "ok":
            return trajectory.with_status(Status.FAILED, score_status=score.status, error_type=score.error_type, error=score.detail)
        return trajectory.with_outcome(score.value, score_parts=score.parts)


def decode_answer(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of all model spans of the last turn, special tokens left out; empty where the policy said nothing."""
    spans = [s for s in trajectory.spans if s.kind == "model"]
    last = max((s.turn for s in spans), default=0)
    ids = chain.from_iterable(trajectory.tokens[s.start : s.end].tolist() for s in spans if s.turn == last)
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _answer(trajectory: Trajectory, text: str) -> Answer:
    return Answer(text=text, n_tokens=trajectory.trainable_tokens, truncated=trajectory.status is Status.TRUNCATED)


def _summary(judged: Sequence[_Judged], rewarded: Sequence[Trajectory], item: Item) -> dict[str, Any]:
    scores = [j.score for j in judged if j.score is not None]
    unscored = [s for s in scores if s.status != "ok"]
    bad = [t for t in rewarded if not (t.status.is_trainable and t.trainable_tokens)]
    parts = [s.parts for s in scores if s.status == "ok"]
    summary: dict[str, Any] = {
        "rewards": [t.total_reward if t.status.is_trainable else math.nan for t in rewarded],
        "statuses": [str(t.status) for t in rewarded],
        "lengths": [t.trainable_tokens for t in rewarded],
        "oldest_versions": [t.oldest_version for t in rewarded],
        "parts": {name: sum(p[name] for p in parts) / len(parts) for name in (parts[0] if parts else ())},
        "unscored": {kind: sum(s.error_type == kind for s in unscored) for kind in {s.error_type for s in unscored}},
        "metrics": _metrics_of(rewarded),
        "label": str(item.info.get("label", "")),
        "environment_errors": {kind: text for t in rewarded for kind, text in t.info.get("environment_errors", {}).items()},
        "environment_failures": _total(t.info.get("environment_failures", {}) for t in rewarded),
        "failed": bool(bad),
        "samples": [_sample(j, t, item) for j, t in zip(judged[:1], rewarded[:1], strict=True)],
    }
    if bad:
        reason = bad[0].info.get("error") or f"the trajectory ended as {bad[0].status}"
        summary["error"] = f"item {item.id}: {len(bad)} of {len(rewarded)} trajectories: {reason}"
    return summary


def _metrics_of(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    """What the episodes say of themselves (``info["metrics"]``), a value for each trajectory that has it."""
    found: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name, value in trajectory.info.get("metrics", {}).items():
            found.setdefault(name, []).append(float(value))
    return found


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _sample(judged: _Judged, trajectory: Trajectory, item: Item) -> SampleRow:
    prompt = item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]
    return SampleRow(
        prompt=prompt[-_SHOWN_PROMPT:],
        answer=str(trajectory.info.get("transcript", judged.text))[:_SHOWN_ANSWER],
        reward=trajectory.total_reward if trajectory.status.is_trainable else None,
        status=str(trajectory.status),
        gold=str(item.answer)[:_SHOWN_PROMPT],
    )
