"""Credit assignment as pure functions over flat token streams (torch only)."""

from reasoner_ray.credit.gae import Credit, action_streams, hierarchical_gae
from reasoner_ray.credit.group import action_returns_to_go, group_advantages
from reasoner_ray.credit.kl import KlKind, kl_estimate
from reasoner_ray.credit.normalise import mean_std, moments, whiten
from reasoner_ray.credit.process import Transform, normalise_groups, step_rewards

__all__ = [
    "Credit",
    "KlKind",
    "Transform",
    "action_returns_to_go",
    "action_streams",
    "group_advantages",
    "hierarchical_gae",
    "kl_estimate",
    "mean_std",
    "moments",
    "normalise_groups",
    "step_rewards",
    "whiten",
]
