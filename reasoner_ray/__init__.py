"""Distributed reinforcement learning for reasoning language models and decision-making agents, on Ray."""

__version__ = "0.1.0"
