"""Environments for teams of agents: any PettingZoo ParallelEnv, and environments stepped as one batch of tensors."""
