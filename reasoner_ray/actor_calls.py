"""Calls of Ray actors from asyncio, one and many."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from ray.exceptions import RayTaskError

from reasoner_ray.errors import ReasonerError

T = TypeVar("T")


async def result_of(ref: Any) -> Any:
    """What a Ray call returns or raises; a ``ReasonerError`` as itself."""
    try:
        return await asyncio.wrap_future(ref.future())
    except RayTaskError as error:
        if isinstance(error.cause, ReasonerError):
            raise error.cause from error
        raise


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Do all of it at once; results in order. The first error cancels the rest, waits until it has ended, and is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
