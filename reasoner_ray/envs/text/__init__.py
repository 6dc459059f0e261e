"""Finite text environments, rebuilt from their rules."""
