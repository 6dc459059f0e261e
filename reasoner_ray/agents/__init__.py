"""Agents that are not language models."""

SCRATCH = "scratch"
"""``model.path`` of a network that begins with new weights; else it is the folder model/ of a run whose weights it begins with."""
