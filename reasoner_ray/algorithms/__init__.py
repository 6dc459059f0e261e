"""Algorithms: registry entries that turn token streams into credit and a loss.

A user's own is a subclass of ``Algorithm`` with a ``name`` and an ``estimate``, named in a job as
``algorithm.name: my_module:MyAlgorithm``.
"""

from reasoner_ray.algorithms.base import (
    Algorithm,
    CriticAlgorithm,
    GroupAlgorithm,
    TokenCriticAlgorithm,
    algorithm_names,
    critic_objective,
    describe_algorithm,
    get_algorithm,
    list_algorithms,
    policy_objective,
    register_algorithm,
)
from reasoner_ray.algorithms.etpo import Etpo, EtpoSettings
from reasoner_ray.algorithms.grpo import Grpo
from reasoner_ray.algorithms.ntpo import Ntpo
from reasoner_ray.algorithms.poad import Poad
from reasoner_ray.algorithms.ppo_action import PpoAction
from reasoner_ray.algorithms.rloo import Rloo
from reasoner_ray.algorithms.settings import AlgorithmSettings, CriticSettings, GroupSettings, TokenCriticSettings

__all__ = [
    "Algorithm",
    "AlgorithmSettings",
    "CriticAlgorithm",
    "CriticSettings",
    "Etpo",
    "EtpoSettings",
    "GroupAlgorithm",
    "GroupSettings",
    "Grpo",
    "Ntpo",
    "Poad",
    "PpoAction",
    "Rloo",
    "TokenCriticAlgorithm",
    "TokenCriticSettings",
    "algorithm_names",
    "critic_objective",
    "describe_algorithm",
    "get_algorithm",
    "list_algorithms",
    "policy_objective",
    "register_algorithm",
]
