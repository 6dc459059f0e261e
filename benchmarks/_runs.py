"""Runs that a measurement finds in its folder: finished ones are taken as they are, if they are of the job that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.errors import ConfigError
from reasoner_ray.trainer.metrics_log import METRICS_FILE, read_jsonl

FREE = ("name", "out", "trainer.steps", "tracking")
"""What may differ: where a run lies, how long it is, how it is watched."""


def steps_of(config: JobConfig) -> int:
    """Training steps of the finished run in the folder of ``config``; 0 where there is none.

    Raises ``ConfigError`` where what lies there was trained otherwise.
    """
    run = config.run_dir
    if not (run / "model").is_dir():
        return 0
    there, wanted = (dict(_leaves(c.model_dump(mode="json"))) for c in (load_config(run / "config.yaml"), config))
    keys = sorted(key for key in there.keys() | wanted.keys() if not _is_free(key))
    found = [key for key in keys if there.get(key) != wanted.get(key)]
    if found:
        named = ", ".join(f"{key}: {there.get(key)}, not {wanted.get(key)}" for key in found[:4])
        raise ConfigError(f"{run} was trained otherwise ({named}); delete it, or take another folder with --out")
    return int(read_jsonl(run / METRICS_FILE)[-1]["step"])


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)
