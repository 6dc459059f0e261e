"""A user's own algorithm, as a job would name it: ``algorithm.name=tests.algorithms.own:Reinforce``."""

from reasoner_ray.algorithms import Algorithm
from reasoner_ray.credit import Credit


class Reinforce(Algorithm):
    """REINFORCE with the mean return of all trajectories as its baseline."""

    name = "reinforce"

    def estimate(self, streams, settings):
        returns = streams.returns_per_trajectory()[streams.trajectory_index]
        return Credit(advantages=returns - returns.mean(), returns=returns)


class Unfinished(Algorithm):
    """Forgets to estimate."""


not_an_algorithm = 3
