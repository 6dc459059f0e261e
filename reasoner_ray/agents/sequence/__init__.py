"""Reinforcement learning as sequence modelling: Decision Transformer, Online DT, and cloning, plain or of the best (kind sequence)."""
