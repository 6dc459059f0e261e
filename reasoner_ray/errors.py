"""Errors that a user can act on: the command line prints their text alone, without a stack."""

from __future__ import annotations


class ReasonerError(Exception):
    """Something the user can mend; the message says what is wrong and what to do."""


class ConfigError(ReasonerError):
    """The configuration is not valid; names the key's path."""


class ModelError(ReasonerError):
    """A model or tokenizer cannot be found, loaded or matched."""


class DataError(ReasonerError):
    """A data set is empty, broken or truncated; names the file and the line."""


class CheckpointError(ReasonerError):
    """A checkpoint is missing, incomplete, or was written for another shape of run."""


class SyncError(ReasonerError):
    """Weights did not arrive: rollout and learner log-probs disagree after a sync."""


class NonFiniteError(ReasonerError):
    """A loss or gradient was NaN or infinite; names the file that holds the offending batch."""


class ScoringError(ReasonerError):
    """A scorer of steps raised, or its scores do not fit the steps; names the scorer."""


class ScorerGaveUp(ScoringError):
    """A scorer of steps hung and was killed, or died, on one solution: that solution has no score, others may have one."""

    def __init__(self, text: str, error_type: str = "Died") -> None:
        super().__init__(text)
        self.error_type = error_type  # Timeout, or Died


class EnvironmentProblem(ReasonerError):
    """The machine lacks something (a package, shared memory, a free port, a Ray cluster)."""


class LearnerLost(ReasonerError):
    """A learner rank died or a collective missed its deadline; the group must be restarted from a checkpoint."""


class EnvironmentFault(ReasonerError):
    """An environment gave what nobody can learn from: NaN, a mask that allows nothing, spaces that do not fit; names it."""
