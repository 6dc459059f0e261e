"""A trained process reward or value model that scores steps: the model of training, packing and all, without its gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch

from reasoner_ray.config import ModelConfig
from reasoner_ray.errors import ScoringError
from reasoner_ray.learner.heads import read_head_info
from reasoner_ray.learner.model import load_policy
from reasoner_ray.learner.settings import LearnerConfig
from reasoner_ray.models import read_config, resolve_model
from reasoner_ray.packing import pack, unpack
from reasoner_ray.prm.incremental import PieceMemory, Rows, prefix_digests, score_rows
from reasoner_ray.prm.readings import read_at
from reasoner_ray.steps import Partial

CACHED = 200_000
"""Scores of prefixes that a model remembers; about 40 MB."""


class StepModel(Protocol):
    """Scores steps in one process."""

    tokens: int
    """Tokens computed so far."""

    def score(self, partials: Sequence[Partial]) -> list[list[float]]:
        """One value a step, read at its last token. Raises ``ScoringError``. Not thread-safe."""
        ...

    def unknown(self, partials: Sequence[Partial]) -> int:
        """About how many tokens ``score`` will compute for them: of each solution those behind the last step that is known."""
        ...

    def forget(self) -> None:
        """Begin anew: nothing scored so far is remembered."""
        ...


class CachedStepModel(ABC):
    """Remembers scores by prefix: the state at a step's end depends on nothing behind it, so a score is its prefix's for ever."""

    def __init__(self, cached: int = CACHED) -> None:
        """``cached`` is how many scores are kept, the most recently used longest."""
        self._known: OrderedDict[bytes, float] = OrderedDict()
        self._cached = cached
        self.tokens = 0

    def score(self, partials: Sequence[Partial]) -> list[list[float]]:
        """See ``StepModel.score``. Only steps that are not known are computed."""
        keys = [self._keys(partial) for partial in partials]
        values = {key: self._known[key] for each in keys for key in each if key in self._known}
        wanted: dict[bytes, None] = {}
        rows = []
        for partial, each in zip(partials, keys, strict=True):
            new = [step for step, key in enumerate(each) if key not in values and key not in wanted]
            wanted.update((each[step], None) for step in new)
            if new:
                rows.append((partial, new))
        if rows:
            values.update(zip(wanted, self._compute(rows), strict=True))
        self._remember(values)
        return [[values[key] for key in each] for each in keys]

    def unknown(self, partials: Sequence[Partial]) -> int:
        """See ``StepModel.unknown``."""
        tokens = 0
        for partial in partials:
            known = [key in self._known for key in self._keys(partial)]
            first = known.index(False) if False in known else len(known)
            tokens += len(partial.tokens) - (partial.ends[first - 1] if first else 0)
        return tokens

    def forget(self) -> None:
        """See ``StepModel.forget``."""
        self._known.clear()

    def _keys(self, partial: Partial) -> list[bytes]:
        """What the score of each step depends on: all tokens up to its end."""
        return prefix_digests(partial)[1:]

    @abstractmethod
    def _compute(self, rows: Rows) -> list[float]:
        """Scores of the steps with these numbers, ascending, of each partial solution; one list in that order."""

    def _remember(self, values: Mapping[bytes, float]) -> None:
        for key, value in values.items():
            self._known[key] = value
            self._known.move_to_end(key)
        while len(self._known) > self._cached:
            self._known.popitem(last=False)


class ProcessModel(CachedStepModel):
    """A folder that ``kind: prm`` or ``kind: value`` wrote. Scores are probabilities of "right so far", or values.

    Keys and values of ``kept_tokens`` tokens are remembered, so that only new steps are computed. With 0 whole prefixes are,
    those that partial solutions share once a row: better for data that comes once.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        tokens_per_microbatch: int = 8192,
        kept_tokens: int = 16_384,
        cached: int = CACHED,
    ) -> None:
        """Load the model. Raises ``ModelError``."""
        super().__init__(cached)
        folder = resolve_model(path)
        self.info = read_head_info(folder)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        learner = LearnerConfig(critic="joint", critic_hidden=self.info.hidden)
        self._policy = load_policy(ModelConfig(path=str(folder), dtype=dtype), learner, device=self._device).eval()
        self._vocabulary, self._longest = int(read_config(folder)["vocab_size"]), longest_context(folder)
        self._name, self._budget = str(path), tokens_per_microbatch
        self._memory = PieceMemory(kept_tokens) if kept_tokens else None

    def forget(self) -> None:
        """See ``StepModel.forget``."""
        super().forget()
        if self._memory is not None:
            self._memory.clear()

    def _compute(self, rows: Rows) -> list[float]:
        for partial, _ in rows:
            self._check(partial)
        if self._memory is None:
            values = self._packed(rows)
        else:
            run = self._policy.resumed_values
            found, computed = score_rows(rows, self._memory, run, budget=self._budget, device=self._device)
            values = torch.tensor(found)
            self.tokens += computed
        scores: list[float] = (torch.sigmoid(values) if self.info.kind == "prm" else values).tolist()
        return scores

    def _packed(self, rows: Rows) -> torch.Tensor:
        readings = [read_at(p.tokens, [p.ends[step] for step in steps], [0.0] * len(steps)) for p, steps in rows]
        batches = pack(readings, tokens_per_microbatch=self._budget, bootstrap="none")
        parts = [self._policy.state_values(batch) for batch in batches]
        self.tokens += sum(batch.n_packed for batch in batches)
        return unpack(batches, parts, sum(len(steps) for _, steps in rows))

    def _check(self, partial: Partial) -> None:
        check_length(self._name, len(partial.tokens), self._longest)
        if partial.start == 0 or max(partial.tokens) >= self._vocabulary:
            raise ScoringError(
                f"{self._name} cannot read a solution: it needs a prompt of at least one token, and tokens below its vocabulary of "
                f"{self._vocabulary}; the policy and the process reward model must share their tokenizer"
            )


def longest_context(folder: Path) -> int:
    """Tokens that the model in ``folder`` was made for, all but endless where it does not say."""
    return int(read_config(folder).get("max_position_embeddings") or 1 << 30)


def check_length(name: str, tokens: int, longest: int) -> None:
    """Raises ``ScoringError`` where a solution is too long for the model ``name``."""
    if tokens > longest:
        raise ScoringError(f"{name} was made for {longest} tokens; a solution has {tokens}: lower rollout.max_context")
