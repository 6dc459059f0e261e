"""One engine for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import tiny_settings


@pytest.fixture(scope="session")
def engine(tiny_model_dir: Path) -> Iterator[Any]:
    """An in-process engine on the tiny model; tests leave it idle, resumed, and may change its weights."""
    from reasoner_ray.rollout.stepping import SteppingEngine

    engine = SteppingEngine(tiny_settings(tiny_model_dir))
    yield engine
    engine.shutdown()


@pytest.fixture
def tiny_model(tiny_model_dir: Path) -> Any:
    """The Hugging Face model the engine was started from."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
