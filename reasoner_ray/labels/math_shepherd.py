"""Math-Shepherd (Wang et al. 2024, arXiv:2312.08935): K completions from the end of every step.

Soft label of a step: the share of completions with the right answer (eq. 4 of the paper, soft estimation). Hard label: 1 where any is
right (eq. 3). After the last step nothing is left to sample: its label is the answer's own grade.
"""

from __future__ import annotations

from reasoner_ray.actor_calls import together
from reasoner_ray.labels.estimates import Estimator, Rollout
from reasoner_ray.labels.records import LabelledSolution, QuestionLabels
from reasoner_ray.steps import Partial


async def label_question(estimator: Estimator, root: Partial, solutions: int) -> QuestionLabels:
    """Labels for ``solutions`` sampled solutions; solutions that share a prefix share its estimate.

    A solution that a limit cut is labelled up to its last closed step, and counted; one without a closed step is left out.
    """
    rollouts = await estimator.sample(root, solutions)
    distinct = {rollout.partial.tokens: rollout for rollout in rollouts}
    labelled = await together(label_solution(estimator, rollout) for rollout in distinct.values())
    kept = tuple(solution for solution in labelled if solution is not None)
    return QuestionLabels(
        status="labelled" if kept else "nothing closed",
        solutions=kept,
        estimates=estimator.estimates,
        cut=sum(rollout.cut for rollout in rollouts),
        graded=estimator.graded,
        grader_failures=estimator.grader_failures,
    )


async def label_solution(estimator: Estimator, rollout: Rollout) -> LabelledSolution | None:
    """A label for each closed step; None where no step was closed."""
    whole = rollout.partial
    closed = len(whole.ends) - rollout.cut
    if not closed:
        return None
    estimated = closed if rollout.cut else closed - 1
    states = await together(estimator.estimate(whole.until(t)) for t in range(1, estimated + 1))
    soft = [state.mc for state in states]
    if not rollout.cut:
        soft.append(None if rollout.right is None else float(rollout.right))
    return LabelledSolution(
        partial=whole.until(closed),
        soft=tuple(soft),
        hard=tuple(None if value is None else value > 0 for value in soft),
        right=None if rollout.cut else rollout.right,
    )
