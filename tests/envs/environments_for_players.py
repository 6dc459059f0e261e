"""Environments that a person meets in the tests of playing."""

from __future__ import annotations

from typing import Any

import gymnasium


class Bracketed(gymnasium.Env[str, str]):
    """Its texts look like the terminal library's markup."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        return "[red]alarm[/red]", {"admissible": ["[bold]run"]}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "over", 1.0, True, False, {"admissible": [], "success": action == "[bold]run"}


class Programs(Bracketed):
    """Shows what it was given; an empty line is no part of it."""

    multiline = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        return "write", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return repr(action), 1.0, True, False, {"success": True}


class Sums(Programs):
    """Wants a number, of which it lists none."""

    multiline = False


class Broken(Bracketed):
    """Fails at the first action."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", 1 / 0, True, False, {}
