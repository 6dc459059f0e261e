"""Streams from one seed do not meet."""

from __future__ import annotations

from reasoner_ray.seeds import BELIEF, LOOK, RUNNERS, derived_seed, derived_seeds


def test_seeds_are_repeatable_and_disjoint() -> None:
    found = [seed for base in range(20) for key in ((), (RUNNERS,), (BELIEF,), (LOOK,)) for seed in derived_seeds(base, 32, *key)]
    assert len(set(found)) == len(found)
    assert derived_seeds(3, 4, BELIEF)[0] == derived_seed(3, BELIEF)
    assert all(0 <= seed < 2**31 for seed in found)


def test_runners_of_neighbouring_jobs_do_not_meet() -> None:
    runners = [derived_seed(job, RUNNERS) + worker for job in range(50) for worker in range(65)]
    assert len(set(runners)) == len(runners)
