"""REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

from reasoner_ray.algorithms.base import GroupAlgorithm, register_algorithm
from reasoner_ray.algorithms.settings import GroupSettings
from reasoner_ray.credit import Credit
from reasoner_ray.trajectory import TokenStreams


@register_algorithm
class Rloo(GroupAlgorithm[GroupSettings]):
    """REINFORCE leave-one-out (Kool et al. 2019; for language models Ahmadian et al. 2024, arXiv 2402.14740).

    Estimator: all tokens of sample i of a prompt share

        A_i = r_i - mean over j != i of r_j

    whose gradient on the first update of a step is that of the expected return, up to the number of tokens it is divided
    by; the loss is clipped as in PPO, which only matters where a step makes several updates.

    When: as grpo, where its division by the std is not wanted; the reward's own scale decides how much a prompt counts.

    How it fails: as grpo on prompts whose samples all score alike; the step size follows the scale of the rewards, so
    tasks with rewards of different size do not mix; with groups of 2 the baseline is one noisy sample.
    """

    name = "rloo"

    def estimate(self, streams: TokenStreams, settings: GroupSettings) -> Credit:
        return self.group_credit(streams, settings, baseline="leave_one_out", scale_by_std=False)
