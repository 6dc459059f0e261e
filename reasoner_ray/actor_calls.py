"""Calls of Ray actors from asyncio."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import RayTaskError

from reasoner_ray.errors import ReasonerError


async def result_of(ref: Any) -> Any:
    """What a Ray call returns or raises; a ``ReasonerError`` as itself."""
    try:
        return await asyncio.wrap_future(ref.future())
    except RayTaskError as error:
        if isinstance(error.cause, ReasonerError):
            raise error.cause from error
        raise
