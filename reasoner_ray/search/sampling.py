"""Methods that sample whole solutions: greedy, self-consistency, best-of-N."""

from __future__ import annotations

from pydantic import Field

from reasoner_ray.search.core import Search, search_method
from reasoner_ray.section import Section


class NoOptions(Section):
    """Nothing to set."""


class SampleOptions(Section):
    """Settings of methods that sample whole solutions."""

    paths: int = Field(8, ge=1, description="solutions sampled")
    wave: int = Field(4, ge=1, description="sampled at once; between waves the budget and the belief over answers are looked at")


@search_method("greedy", NoOptions, answers="majority", scored=False)
async def greedy(search: Search[NoOptions]) -> None:
    """The likeliest token at each place: one solution, the baseline."""
    await search.sample(1, temperature=0.0)


@search_method("self_consistency", SampleOptions, answers="majority", scored=False)
async def self_consistency(search: Search[SampleOptions]) -> None:
    """The answer that most of N sampled solutions give (Wang et al. 2022). Needs no scorer; fails where wrong answers agree."""
    await _sample_in_waves(search)


@search_method("best_of_n", SampleOptions)
async def best_of_n(search: Search[SampleOptions]) -> None:
    """N sampled solutions, judged by the scorer: its values vote, or the best wins (``search.answers: max``)."""
    await _sample_in_waves(search)


async def _sample_in_waves(search: Search[SampleOptions]) -> None:
    left = search.options.paths
    # Waves matter only to what looks at them; without it all solutions share one batch.
    limited = search.config.stopping is not None or any(v is not None for _, v in search.config.budget)
    while left and search.wants_more(search.options.paths):
        n = min(left, search.options.wave) if limited else left
        await search.sample(n)
        left -= n
