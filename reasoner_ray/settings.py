"""The one module that reads or writes environment variables."""

from __future__ import annotations

import os
from pathlib import Path


def set_learner_environment(rank: int, local_rank: int, world_size: int, *, cuda: bool) -> None:
    """What DeepSpeed reads when it is imported and initialised: its accelerator and this process's rank."""
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    os.environ["RANK"] = str(rank)
    os.environ["LOCAL_RANK"] = str(local_rank)
    os.environ["WORLD_SIZE"] = str(world_size)


def learner_environment(*, cpu: bool) -> dict[str, str]:
    """What must be set before a learner's process imports PyTorch."""
    # Threads that wait for each other must sleep: beside other busy processes, spinning halves the learner's speed.
    return {"OMP_WAIT_POLICY": "passive"} if cpu else {}


def replace_environment(variables: dict[str, str]) -> None:
    """Leave nothing in this process's environment but these: generated code is told nothing of its surroundings."""
    os.environ.clear()
    os.environ.update(variables)


def cache_dir() -> Path:
    """Where converted models are kept: ``$REASONER_RAY_CACHE``, else ``reasoner-ray`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("REASONER_RAY_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "reasoner-ray"


def hub_offline() -> bool:
    """Whether the user forbade network access to the Hugging Face hub (``HF_HUB_OFFLINE``)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def engine_environment(*, in_process: bool, cpu: bool) -> dict[str, str]:
    """What vLLM, PyTorch and OpenMP read in an engine's process; all of it must be set before they are imported."""
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
    }
    if cpu:
        # Threads that wait for each other must sleep: on a machine whose cores are shared, spinning is several times slower.
        variables["OMP_WAIT_POLICY"] = "passive"
        # vLLM compiles one small function of its sampler, which takes seconds and a C++ compiler, and gains nothing here.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables


def set_engine_environment(*, in_process: bool) -> None:
    """The part of ``engine_environment`` that still takes effect in a process that runs already."""
    os.environ.update(engine_environment(in_process=in_process, cpu=False))
    if not in_process:
        os.environ["REASONER_RAY_ENGINE_OWNER"] = str(os.getpid())


def engine_owner() -> int | None:
    """In vLLM's own processes: the id of the process whose engine they are."""
    owner = os.environ.get("REASONER_RAY_ENGINE_OWNER")
    return int(owner) if owner else None


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def module_path() -> dict[str, str]:
    """The search path for a user's own modules, for actors on nodes that Ray was started on without it."""
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": path} if path else {}


def ray_address() -> str | None:
    """The cluster that Ray joins where none is named (``RAY_ADDRESS``; Ray sets it in the jobs it runs)."""
    return os.environ.get("RAY_ADDRESS") or None


def ray_token() -> str | None:
    """The user's Ray token, from where Ray itself looks: ``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH``, ``~/.ray/auth_token``."""
    named = os.environ.get("RAY_AUTH_TOKEN")
    if named:
        return named.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return file.read_text().strip() or None if file.is_file() else None
