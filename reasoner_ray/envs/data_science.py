"""An agent writes the body of a function that fits a classifier; the reward is how well it ranks data it did not see."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import Any, get_args

import gymnasium
import numpy as np
import numpy.typing as npt

from reasoner_ray.envs.data_science_sets import Table, check_splits, load_table, need_sklearn, places_of_labels
from reasoner_ray.errors import ConfigError
from reasoner_ray.sandbox.box import Sandbox
from reasoner_ray.sandbox.limits import Level, Limits
from reasoner_ray.sandbox.program import Status, decode_array

FAILED_REWARD = -1.0
MAX_ACTION = 20_000
"""Characters of an action; a longer one is an error."""
STARTING_S = 5.0
"""Seconds for a program's process to begin and end."""
FORBIDDEN = ("GridSearchCV(",)
UNREADABLE = ("SyntaxError", "IndentationError", "TabError", "TooLong", "Forbidden")
"""Errors of an action that is no program that may run."""
FAILURES = ("unreadable", *(status for status in get_args(Status) if status != "ok"))
"""How a try fails: before it runs, or as the sandbox says; predictions that cannot be scored are an "error"."""
PRELOAD = tuple(
    f"sklearn.{name}"
    for name in "ensemble linear_model tree svm neighbors naive_bayes neural_network discriminant_analysis pipeline preprocessing "
    "model_selection calibration feature_selection decomposition compose impute kernel_approximation".split()
)
"""Importing them takes seconds of CPU time: it is done once for all programs, not once for each split."""

_DEF = "def build_model(x_train, y_train):"
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n\t"
_FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_FULL = re.compile(r"^[ \t]*def build_model\(.*$", re.MULTILINE)

# Runs in the sandbox, once for each split; nothing that it writes is believed before it is checked.
_HARNESS = """
with open("build_model.py", encoding="utf-8") as file:
    code = compile(file.read(), "build_model.py", "exec", dont_inherit=True)  # before what takes a second to import

import numpy as np

space = {"np": np, "__name__": "build_model"}
exec(code, space)
x_train, y_train, x_test = (np.load(name + ".npy", allow_pickle=False) for name in ("x_train", "y_train", "x_test"))
model = space["build_model"](x_train, y_train)
np.save("probabilities.npy", np.asarray(model.predict_proba(x_test), dtype=np.float64), allow_pickle=False)
np.save("classes.npy", np.asarray(model.classes_), allow_pickle=False)
"""


@dataclass(frozen=True, slots=True)
class _Trial:
    """What came of one program."""

    auc: float | None  # mean over the splits, None where it failed
    error_type: str | None = None
    message: str = ""
    status: Status = "error"

    @property
    def failure(self) -> str | None:
        """One of FAILURES; None where the program ran."""
        if self.error_type is None:
            return None
        return "unreadable" if self.error_type in UNREADABLE else self.status


class DataScience(gymnasium.Env[str, str]):
    """Write the body of ``build_model(x_train, y_train)``; reward is its mean ROC-AUC on unseen halves of a data set, or -1.

    An action is the function's body, indented or not. ``np`` is numpy, everything else is to be imported; the body ends
    with ``return model``, which is added where it is missing, and what follows it is cut off. A fenced code block and a
    whole ``def build_model(...)`` are taken as well. The model needs ``predict_proba`` and ``classes_``, as scikit-learn's
    classifiers have.

    Every split into random halves (seeds ``seed`` to ``seed + splits - 1``) runs in a sandboxed process of its own, since
    the labels that one split tests are among those that another trains on. The process gets the training half and the
    other half's features; ROC-AUC (one-vs-one for several classes) is computed here. The episode ends with the first
    program that runs, else after ``tries``; a failed program is shown with its error in the next observation.

    ``info``: ``success``, ``auc`` (None where it failed), ``error_type``, ``ending`` ("ran", "tries" or None),
    ``isolation``, the level of the sandbox, ``invalid`` (the action was no program that may run) and ``metrics`` of the episode
    so far: ``auc`` where one ran, and how many tries failed in which way (``failed_timeout`` and so on, see FAILURES).
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (gymnasium's own name and type)
    multiline = True
    """For ``reasoner play``: an action takes several lines."""

    def __init__(
        self,
        dataset: str = "balance-scale",
        target: str | None = None,
        *,
        tries: int = 5,
        timeout_s: float = 30.0,
        splits: int = 5,
        seed: int = 0,
        isolation: str = Level.LANDLOCK,
    ) -> None:
        """``dataset``: balance-scale, tic-tac-toe, wine, iris, digits, breast-cancer, breast-w, diabetes, kidney-stone, or the
        path of a .csv file whose column ``target`` is predicted. ``timeout_s``: seconds for each split.
        ``isolation``: the weakest level of the sandbox that will do. ``longest_step_s``: seconds that a step may take.

        Raises ``ConfigError``, ``DataError`` for a broken file (with its line), and ``EnvironmentProblem`` where a package
        is missing or this machine cannot shut programs in.
        """
        for name, value in (("tries", tries), ("splits", splits), ("timeout_s", timeout_s)):
            if value <= 0:
                raise ConfigError(f"{name} must be positive (got {value})")
        need_sklearn()
        self._table = load_table(dataset, target)
        self._tries, self._timeout_s = tries, timeout_s
        self._halves = [_halve(len(self._table.labels), seed + index) for index in range(splits)]
        check_splits(self._table, self._halves)
        limits = Limits(seconds=timeout_s, cpu_seconds=math.ceil(2 * timeout_s))
        self._sandbox = Sandbox(limits, minimum=isolation, hidden=places_of_labels(dataset), preload=PRELOAD)
        self.longest_step_s = splits * (timeout_s + STARTING_S)
        self._used = 0
        self._is_over = True
        self.observation_space = gymnasium.spaces.Text(2 * MAX_ACTION + 4000, charset=_CHARACTERS)
        self.action_space = gymnasium.spaces.Text(MAX_ACTION, min_length=0, charset=_CHARACTERS)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """The task. The splits are those of the constructor's seed, in every episode."""
        super().reset(seed=seed, options=options)
        self._used, self._is_over = 0, False
        self._failures: Counter[str] = Counter()
        return _ascii(self.prompt()), {"isolation": str(self._sandbox.level)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Run the body on every split. Raises ``gymnasium.error.ResetNeeded`` after the end of an episode."""
        if self._is_over:
            raise gymnasium.error.ResetNeeded("the episode is over: call reset first")
        self._used += 1
        body = function_body(action[:MAX_ACTION])
        trial = self._try(body) if len(action) <= MAX_ACTION else _Trial(None, "TooLong", f"it is longer than {MAX_ACTION} characters")
        ending = "ran" if trial.auc is not None else "tries" if self._used >= self._tries else None
        self._is_over = ending is not None
        if trial.failure is not None:
            self._failures[trial.failure] += 1
        counts = {f"failed_{kind}": float(self._failures[kind]) for kind in FAILURES}
        info = {
            "invalid": trial.failure == "unreadable",
            "metrics": counts if trial.auc is None else {**counts, "auc": trial.auc},
            "success": trial.auc is not None,
            "auc": trial.auc,
            "error_type": trial.error_type,
            "ending": ending,
            "isolation": str(self._sandbox.level),
        }
        if trial.auc is not None:
            return f"The program ran: mean ROC-AUC {trial.auc:.4f}.", trial.auc, True, False, info
        return _ascii(self._reflection(body, trial)), FAILED_REWARD, self._is_over, False, info

    def prompt(self) -> str:
        """What the agent is to do, ending where the body begins."""
        table, rows = self._table, len(self._halves[0][0])
        labels = ", ".join(str(index) for index in range(len(table.classes)))
        return (
            f'"""Classification with the {table.name} data set.\n\n'
            "Write the body of build_model: fit a classifier of scikit-learn that has predict_proba, and return it.\n"
            f"Its score is the mean ROC-AUC on data it has not seen. It has {self._timeout_s:g} seconds; GridSearchCV is not allowed.\n"
            '"""\n'
            f"import numpy as np\n\n\n{_DEF}\n"
            f"    # x_train: float array of shape ({rows}, {table.features.shape[1]}); "
            f"y_train: int array of shape ({rows},), values {labels}; end with: return model\n"
        )

    def _reflection(self, body: str, trial: _Trial) -> str:
        return f"The program failed: {trial.message}\n\nIt was:\n{_program(body)}\nWrite a body that runs.\n\n{self.prompt()}"

    def _try(self, body: str) -> _Trial:
        for word in FORBIDDEN:
            if word in body:
                return _Trial(None, "Forbidden", f"{word.rstrip('(')} is not allowed")
        scores = []
        for train, test in self._halves:
            trial = self._run(body, train, test)
            if trial.auc is None:
                return trial
            scores.append(trial.auc)
        return _Trial(float(np.mean(scores)))

    def _run(self, body: str, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]) -> _Trial:
        """One split. The labels of ``test`` are not among what the sandbox gets."""
        features, labels = self._table.features, self._table.labels
        inputs: dict[str, bytes | npt.NDArray[Any]] = {
            "build_model.py": _program(body).encode("utf-8", "replace"),
            "x_train.npy": features[train],
            "y_train.npy": labels[train],
            "x_test.npy": features[test],
        }
        outcome = self._sandbox.run(_HARNESS, inputs, ["probabilities.npy", "classes.npy"])
        if outcome.status != "ok":
            return _Trial(None, outcome.error_type or outcome.status, outcome.detail or str(outcome.error_type), outcome.status)
        try:
            return _Trial(score(self._table, test, outcome.outputs))
        except ValueError as error:
            return _Trial(None, "BadOutput", f"the model's predictions cannot be scored: {error}"[:500])


def score(table: Table, test: npt.NDArray[np.int64], outputs: dict[str, bytes]) -> float:
    """ROC-AUC of the probabilities that a program wrote, for the rows ``test``. Raises ``ValueError`` for anything odd."""
    from sklearn.metrics import roc_auc_score

    if len(outputs) < 2:
        raise ValueError("there are none")
    classes, chances = decode_array(outputs["classes.npy"], "iu"), decode_array(outputs["probabilities.npy"], "f")
    count = len(table.classes)
    if sorted(classes.ravel().tolist()) != list(range(count)) or chances.shape != (len(test), count):
        raise ValueError(f"shape {chances.shape} for {len(test)} rows, and classes {classes.ravel()[:10].tolist()} of {count}")
    if not np.isfinite(chances).all() or chances.min() < 0 or not np.allclose(chances.sum(axis=1), 1):
        raise ValueError("they are not probabilities")
    ordered = chances[:, np.argsort(classes.ravel())]
    return float(roc_auc_score(table.labels[test], ordered[:, 1] if count == 2 else ordered, multi_class="ovo"))


def function_body(action: str) -> str:
    """The body of the function within what an agent wrote: without fences, ``def`` line and whatever follows the end."""
    text = action.expandtabs(4).replace("\r\n", "\n")
    fence = _FENCE.search(text)
    if fence:
        text = fence[1]
    full = _FULL.search(text)
    if full:  # what stands before the function (imports) moves into it
        inside: list[str] = []
        for line in text[full.end() :].strip("\n").split("\n"):
            if line.strip() and _indent(line) <= _indent(full[0]):
                break
            inside.append(line)
        text = "\n".join([*_dedent(text[: full.start()].split("\n")), *_dedent(inside)])
    lines = text.strip("\n").rstrip().split("\n")
    base = _base_indent(lines)
    kept = [" " * max(base, _indent(lines[0])) + lines[0].lstrip()]
    for line in lines[1:]:
        if line.strip() and _indent(line) < base:
            break
        kept.append(line)
        if line.strip() == "return model" and _indent(line) == base:
            break
    return "\n".join(_dedent(kept)).rstrip()


def _base_indent(lines: list[str]) -> int:
    """How far the body is indented. Its first line may continue a prompt that had indented it already."""
    own, rest = _indent(lines[0]), [line for line in lines[1:] if line.strip()]
    if own or not rest:
        return own
    deeper, end = _indent(rest[0]), lines[0].rstrip()[-1:]
    if end == ":":
        return max(deeper - 4, 0)
    # Within brackets any indent is allowed: there the lines after them tell.
    return min(map(_indent, rest)) if end and end in "([{,\\" else deeper


def _program(body: str) -> str:
    """The function with this body. Its first line is ``def``, so that line numbers of errors fit what the agent is shown."""
    lines = [f"    {line}".rstrip() for line in _dedent(body.split("\n"))]
    end = [] if lines[-1] == "    return model" else ["    return model"]
    return "\n".join([_DEF, *lines, *end, ""])


def _dedent(lines: list[str]) -> list[str]:
    margin = min((_indent(line) for line in lines if line.strip()), default=0)
    return [line[margin:].rstrip() for line in lines]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _halve(rows: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to train on and to test on, a random half each."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(rows), test_size=0.5, random_state=seed)
    return train, test


def _ascii(text: str) -> str:
    return "".join(letter if letter in _CHARACTERS else "?" for letter in text)
