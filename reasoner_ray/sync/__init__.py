"""From the learner's weights to the rollout engines."""
