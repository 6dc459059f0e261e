"""The one data type that flows from the rollout to the gradient step.

A ``Trajectory`` holds aligned per-token streams; token ids are the only representation of an action.
``TokenStreams`` is the learner's flat view of many trajectories (trainable tokens only), which credit
assignment and losses work on; ``Batch`` (see ``packing.py``) is what one forward pass computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import torch

from reasoner_ray.choices import Choice

Bootstrap = Literal["none", "unended", "truncated"]
"""Which trajectories go on with the critic's value after their last token: none, those that nothing but our limits ended, or also
those that a limit of the environment's or of tokens cut."""
ENV_VERSION = -1
"""Policy version of a token that no policy sampled (prompt, observation, tool output)."""


class Status(StrEnum):
    """How a trajectory ended."""

    FINISHED = "finished"  # the policy or the environment ended it
    TRUNCATED = "truncated"  # a limit of tokens, turns or time cut it
    FAILED = "failed"  # an error in the environment or the scorer; never trained on
    ABORTED = "aborted"  # stopped by us (worker lost, run ended)

    @property
    def is_trainable(self) -> bool:
        """True where the trajectory's rewards mean what they say."""
        return self in (Status.FINISHED, Status.TRUNCATED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A half-open range ``[start, end)`` of token indices with one author.

    A model span is one *action*: credit between actions ends and begins at its borders. Its tokens see those from
    ``context_start`` on: an episode whose earlier turns were forgotten has several contexts, each beginning where a new
    prompt was written.
    """

    kind: Literal["model", "env"]
    start: int
    end: int
    turn: int = 0
    step: int = 0
    agent: int = 0
    context_start: int = 0
    choice: Choice | None = None  # the list that a model span was chosen from; None: free text
    duration: int = 1  # environment steps that a model span's action took; what follows is discounted by as many


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One episode as aligned per-token streams of length T (numpy, cheap to serialise).

    Raises ``ValueError`` on construction where the streams disagree in length or a span is out of range.
    """

    id: str
    group_id: str
    task: str
    tokens: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]; True on tokens the policy sampled and is trained on
    behaviour_logprobs: np.ndarray  # float32 [T]; log mu(token), nats; 0 where loss_mask is False
    policy_versions: np.ndarray  # int32 [T]; ENV_VERSION where loss_mask is False
    rewards: np.ndarray  # float32 [T]; sparse, only on trainable tokens
    spans: tuple[Span, ...]
    status: Status = Status.FINISHED
    info: dict[str, Any] = field(default_factory=dict)
    unended: bool = False  # truncated by limits of ours alone, while its environment went on

    def __post_init__(self) -> None:
        length = len(self.tokens)
        for name in ("loss_mask", "behaviour_logprobs", "policy_versions", "rewards"):
            if len(getattr(self, name)) != length:
                raise ValueError(f"trajectory {self.id}: {name} has {len(getattr(self, name))} entries for {length} tokens")
        for span in self.spans:
            if not 0 <= span.context_start <= span.start <= span.end <= length:
                raise ValueError(f"trajectory {self.id}: span {span} lies outside its {length} tokens")
            if span.choice is not None and tuple(self.tokens[span.start : span.end].tolist()) != span.choice.tokens:
                raise ValueError(f"trajectory {self.id}: the span at {span.start} does not hold the candidate that was chosen")
        if length and any(self.loss_mask[start] for start in self.context_starts if start < length):
            raise ValueError(f"trajectory {self.id}: the first token has no context, so it cannot be trained on")

    @property
    def context_starts(self) -> list[int]:
        """Where each context begins, ascending; the first is 0."""
        return sorted({0, *(span.context_start for span in self.spans)})

    @property
    def total_reward(self) -> float:
        """Undiscounted sum of rewards."""
        return float(self.rewards.sum())

    @property
    def trainable_tokens(self) -> int:
        """Number of tokens that carry a gradient."""
        return int(self.loss_mask.sum())

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that sampled one of its tokens (ENV_VERSION if none did)."""
        versions = self.policy_versions[self.loss_mask]
        return int(versions.min()) if len(versions) else ENV_VERSION

    def goes_on(self, bootstrap: Bootstrap) -> bool:
        """Whether the state after its last token has a value that counts."""
        return self.status is Status.TRUNCATED and (bootstrap == "truncated" or (bootstrap == "unended" and self.unended))

    def with_outcome(self, reward: float, **info: Any) -> Trajectory:
        """A copy with ``reward`` added at the last trainable token and ``info`` merged in."""
        rewards = self.rewards.copy()
        trainable = np.flatnonzero(self.loss_mask)
        if len(trainable):
            rewards[trainable[-1]] += reward
        return replace(self, rewards=rewards, info={**self.info, **info})

    def with_status(self, status: Status, **info: Any) -> Trajectory:
        """A copy with another status and ``info`` merged in."""
        return replace(self, status=status, info={**self.info, **info})


class TrajectoryBuilder:
    """Grows a trajectory turn by turn from token ids; nothing is decoded and encoded again."""

    def __init__(self, *, id: str, group_id: str, task: str, info: dict[str, Any] | None = None) -> None:
        self._identity = {"id": id, "group_id": group_id, "task": task}
        self._info = dict(info or {})
        self._tokens: list[int] = []
        self._mask: list[bool] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._rewards: list[float] = []
        self._spans: list[Span] = []
        self._context_start = 0

    @property
    def tokens(self) -> list[int]:
        """Token ids of the context so far: what the next generation sees."""
        return self._tokens[self._context_start :]

    def add_env(self, tokens: Sequence[int], *, turn: int = 0, agent: int = 0, new_context: bool = False) -> None:
        """Append tokens that the policy did not choose; with ``new_context`` what follows sees nothing before them."""
        if new_context:
            self._context_start = len(self._tokens)
        self._extend("env", tokens, [0.0] * len(tokens), [ENV_VERSION] * len(tokens), turn=turn, agent=agent)

    def add_model(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        versions: Sequence[int],
        *,
        turn: int = 0,
        step: int = 0,
        agent: int = 0,
        choice: Choice | None = None,
    ) -> None:
        """Append one sampled action: its ids, behaviour log-probs and policy versions, and the list it was chosen from."""
        self._extend("model", tokens, logprobs, versions, turn=turn, step=step, agent=agent, choice=choice)

    def add_reward(self, reward: float) -> None:
        """Credit ``reward`` to the last trainable token so far."""
        for i in range(len(self._mask) - 1, -1, -1):
            if self._mask[i]:
                self._rewards[i] += reward
                return
        raise ValueError("a reward needs an action before it")

    def set_duration(self, steps: int) -> None:
        """Say how many steps of the environment the last action took. Raises ``ValueError`` where there is none."""
        for i in range(len(self._spans) - 1, -1, -1):
            if self._spans[i].kind == "model":
                self._spans[i] = replace(self._spans[i], duration=steps)
                return
        raise ValueError("a duration needs an action before it")

    def build(self, status: Status = Status.FINISHED, *, unended: bool = False, **info: Any) -> Trajectory:
        """The finished trajectory."""
        return Trajectory(
            **self._identity,
            tokens=np.asarray(self._tokens, dtype=np.int32),
            loss_mask=np.asarray(self._mask, dtype=bool),
            behaviour_logprobs=np.asarray(self._logprobs, dtype=np.float32),
            policy_versions=np.asarray(self._versions, dtype=np.int32),
            rewards=np.asarray(self._rewards, dtype=np.float32),
            spans=tuple(self._spans),
            status=status,
            unended=unended,
            info={**self._info, **info},
        )

    def _extend(
        self, kind: Literal["model", "env"], tokens: Sequence[int], logprobs: Sequence[float], versions: Sequence[int], **span: Any
    ) -> None:
        if not len(tokens) == len(logprobs) == len(versions):
            raise ValueError(f"{len(tokens)} tokens, {len(logprobs)} log-probs and {len(versions)} versions do not align")
        start = len(self._tokens)
        self._tokens.extend(int(t) for t in tokens)
        self._mask.extend([kind == "model"] * len(tokens))
        self._logprobs.extend(float(x) for x in logprobs)
        self._versions.extend(int(v) for v in versions)
        self._rewards.extend([0.0] * len(tokens))
        self._spans.append(Span(kind=kind, start=start, end=len(self._tokens), context_start=self._context_start, **span))


@dataclass(slots=True, kw_only=True)
class TokenStreams:
    """The K trainable tokens of n trajectories, flat, in trajectory order and then token order.

    Environment tokens do not appear: credit passes over them undecayed.
    """

    rewards: torch.Tensor  # float32 [K]
    behaviour_logprobs: torch.Tensor  # float32 [K]; log mu, from the rollout engine
    trajectory_index: torch.Tensor  # int64 [K]; which of the n trajectories
    action_index: torch.Tensor  # int64 [K]; which action, numbered over the whole set
    action_end: torch.Tensor  # bool [K]; last token of its action
    trajectory_end: torch.Tensor  # bool [K]; last trainable token of its trajectory
    group_index: torch.Tensor  # int64 [n]; which group a trajectory belongs to
    truncated: torch.Tensor  # bool [n]; cut by a limit, so the value after the last token may be bootstrapped
    unended: torch.Tensor | None = None  # bool [n]; truncated, and by our limits alone; None: none is
    durations: torch.Tensor | None = None  # float32 [K]; environment steps that the token's action took; None: 1 each
    values: torch.Tensor | None = None  # float32 [K]; V(state that predicts the token)
    bootstrap: torch.Tensor | None = None  # float32 [n]; V(state after the last token), 0 where terminal
    old_logprobs: torch.Tensor | None = None  # float32 [K]; log pi_old, learner's, before the update
    ref_logprobs: torch.Tensor | None = None  # float32 [K]; log pi_ref
    target_q: torch.Tensor | None = None  # float32 [K]; E_pi[Q of the target network] in the state that predicts the token
    kl: torch.Tensor | None = None  # float32 [K]; KL(pi || pi_ref) of that state's distribution, nats

    @property
    def n_tokens(self) -> int:
        """K."""
        return len(self.rewards)

    @property
    def n_trajectories(self) -> int:
        """n."""
        return len(self.group_index)

    def returns_per_trajectory(self) -> torch.Tensor:
        """Undiscounted return of each trajectory, float32 [n]."""
        totals = torch.zeros(self.n_trajectories, dtype=self.rewards.dtype)
        return totals.index_add(0, self.trajectory_index, self.rewards)


def flatten(trajectories: Sequence[Trajectory]) -> TokenStreams:
    """The trainable tokens of ``trajectories`` as flat streams (CPU tensors)."""
    rewards, behaviour, owner, action, action_end, trajectory_end, durations = [], [], [], [], [], [], []
    groups: dict[str, int] = {}
    next_action = 0
    for i, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory.group_id, len(groups))
        positions = np.flatnonzero(trajectory.loss_mask)
        span_of = np.zeros(len(trajectory.tokens), dtype=np.int64)
        for s, span in enumerate(trajectory.spans):
            span_of[span.start : span.end] = s
        spans = span_of[positions]
        durations.append(np.array([span.duration for span in trajectory.spans])[spans] if len(positions) else np.zeros(0))
        starts = np.diff(spans, prepend=-1) != 0
        numbers = next_action + np.cumsum(starts) - 1
        next_action += int(starts.sum())
        rewards.append(trajectory.rewards[positions])
        behaviour.append(trajectory.behaviour_logprobs[positions])
        owner.append(np.full(len(positions), i))
        action.append(numbers)
        action_end.append(np.append(starts[1:], True) if len(positions) else starts)
        trajectory_end.append(np.arange(len(positions)) == len(positions) - 1)

    def join(parts: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(dtype) if parts else torch.zeros(0, dtype=dtype)

    return TokenStreams(
        rewards=join(rewards, torch.float32),
        behaviour_logprobs=join(behaviour, torch.float32),
        trajectory_index=join(owner, torch.int64),
        action_index=join(action, torch.int64),
        action_end=join(action_end, torch.bool),
        trajectory_end=join(trajectory_end, torch.bool),
        group_index=torch.tensor([groups[t.group_id] for t in trajectories], dtype=torch.int64),
        truncated=torch.tensor([t.status is Status.TRUNCATED for t in trajectories], dtype=torch.bool),
        unended=torch.tensor([t.goes_on("unended") for t in trajectories], dtype=torch.bool),
        durations=join(durations, torch.float32),
    )
