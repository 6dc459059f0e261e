"""Many calls at once: results in order, and nothing goes on behind an error."""

from __future__ import annotations

import asyncio

import pytest

from reasoner_ray.actor_calls import together


def test_results_come_in_order() -> None:
    async def late(value: int) -> int:
        await asyncio.sleep(0.01 * (3 - value))
        return value

    assert asyncio.run(together(late(i) for i in range(3))) == [0, 1, 2]


def test_the_first_error_ends_the_rest() -> None:
    seen: list[str] = []

    async def fails() -> None:
        await asyncio.sleep(0.01)
        raise KeyError("this one")

    async def goes_on() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    with pytest.raises(KeyError, match="this one"):
        asyncio.run(together([goes_on(), fails(), goes_on()]))
    assert seen == ["cancelled", "cancelled"]
