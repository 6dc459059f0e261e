"""What every part of a job's configuration is made of; parts with files of their own import it from here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from reasoner_ray.errors import ConfigError


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


S = TypeVar("S", bound=Section)


def given_section(kind: type[S], given: S | Mapping[str, Any] | None, name: str) -> S:
    """Settings given as such, as plain data, or not at all. Raises ``ConfigError``, which ``name`` begins, one part a problem."""
    if isinstance(given, kind):
        return given
    try:
        return kind.model_validate(given or {})
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ConfigError(f"{name}: " + "; ".join(lines)) from None
