"""POAD."""

from __future__ import annotations

from reasoner_ray.algorithms.base import TokenCriticAlgorithm, register_algorithm


@register_algorithm
class Poad(TokenCriticAlgorithm):
    """Policy optimisation with action decomposition (Wen et al. 2024, arXiv 2405.15821): token-level PPO, BAD backup.

    Estimator: a value V_j for the state before each token j of an action of n tokens, and GAE on the backup

        j < n:  delta_j = V_{j+1} - V_j                     A_j = delta_j + lambda_token A_{j+1}
        j = n:  delta_n = R + gamma_action V'_1 - V_n       A_n = delta_n + gamma_action lambda_action A'_1

    with gamma_token = 1 and ' for the next action: the tokens of an action are decided one after another, but time
    passes only between actions, so the optimal policy is that of the original problem, whatever the length of its
    actions. The deltas of an action add up to R + gamma_action V'_1 - V_1.

    When: the default. Actions of several tokens of which few decide (tool calls, moves, short answers), episodes of
    several turns; wherever a critic can tell good prefixes from bad ones.

    How it fails: it is as good as its critic, which learns from nothing in the first steps; a far too high critic_lr
    shows as explained_variance below 0. gamma_token = 1 alone does not keep credit alive: with lambda_token = 0.95 the
    first of 128 tokens sees 0.95^127 = 0.0015 of the outcome, so lambda_token is 1 here (the reference code shares one
    lambda); lower it where the critic is good and the variance high. gamma_action = 1 is reported to collapse in long
    episodes; with one action an episode it has no effect. Truncated episodes end with what they earned
    (bootstrap_truncated = false): for answers cut by a token limit a bootstrapped value would reward never finishing.
    """

    name = "poad"
