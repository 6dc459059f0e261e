"""GRPO and its unbiased form."""

from __future__ import annotations

from pydantic import Field

from reasoner_ray.algorithms.base import GroupAlgorithm, register_algorithm
from reasoner_ray.algorithms.settings import GroupSettings
from reasoner_ray.credit import Credit
from reasoner_ray.trajectory import TokenStreams


class GrpoSettings(GroupSettings):
    """Settings of GRPO."""

    scale_by_std: bool = Field(True, description="divide by the group's standard deviation; false: the unbiased form (Dr. GRPO)")


@register_algorithm
class Grpo(GroupAlgorithm[GrpoSettings]):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300, sec. 4.1).

    Estimator: all tokens of sample i of a prompt share

        A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)

    with the clipped loss a token. The loss is the mean over all tokens of the step; the paper's mean over each answer
    first is loss_average = sequence. The unbiased form (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783) is
    scale_by_std = false, loss_average = constant.

    When: one answer a prompt with a verifiable reward and room for several samples; no critic to train or store.

    How it fails: a prompt whose samples all score alike teaches nothing, so very easy and very hard tasks waste their
    rollouts. Dividing by the std weighs nearly solved and nearly unsolved prompts up; loss_average = sequence makes long
    wrong answers cheap. In long episodes one number for all turns says little: credit = action gives each turn the
    return from it on.
    """

    name = "grpo"
    settings_type = GrpoSettings

    def estimate(self, streams: TokenStreams, settings: GrpoSettings) -> Credit:
        return self.group_credit(streams, settings, baseline="mean", scale_by_std=settings.scale_by_std)
