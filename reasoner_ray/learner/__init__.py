"""The learner: packed forward passes, DeepSpeed, checkpoints."""
