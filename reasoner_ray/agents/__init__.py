"""Agents that are not language models."""
