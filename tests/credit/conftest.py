"""Fixtures of this folder."""

from tests.credit.threads import one_thread

__all__ = ["one_thread"]
