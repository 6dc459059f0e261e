"""How well this machine shuts a program in: found by trying, strongest level first."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from reasoner_ray.errors import EnvironmentProblem
from reasoner_ray.sandbox.confine import NO_OTHER_USER
from reasoner_ray.sandbox.limits import Level, Limits

_PROBE = """
import json, os, socket

with open("probe.json") as file:
    secret, beside, parent, started = json.load(file)
reached = set()

def attempt(kind, action):
    try:
        if action():
            reached.add(kind)
    except OSError:
        pass

def is_parent_visible():
    with open(f"/proc/{parent}/stat") as file:
        return file.read().rpartition(")")[2].split()[19] == started  # else another process has this id in here

def can_signal_parent():
    os.kill(parent, 0)
    return not os.access("/proc/self/stat", os.R_OK) or is_parent_visible()

attempt("network", socket.socket)
attempt("files", lambda: open(secret))
attempt("files", lambda: open(beside, "w"))
attempt("processes", is_parent_visible)
attempt("processes", can_signal_parent)
with open("reached.json", "w") as file:
    json.dump(sorted(reached), file)
"""
_PROBE_LIMITS = Limits(seconds=60.0)


@dataclass(frozen=True, slots=True)
class Isolation:
    """The strongest level that this machine really has."""

    level: Level
    refusals: dict[Level, str]  # why it has none of the stronger ones

    def describe(self) -> str:
        """One sentence for a report."""
        contained = ", ".join(sorted(self.level.contained)) or "nothing"
        text = [f"{self.level}: {contained} contained"]
        for reason in dict.fromkeys(self.refusals.values()):
            text.append(f"no {', '.join(level for level, why in self.refusals.items() if why == reason)}: {reason}")
        return "; ".join(text)


@functools.cache
def isolation_level() -> Isolation:
    """Find the strongest level by running a probe in each, about half a second; the answer is kept for this process."""
    refusals: dict[Level, str] = {}
    for level in Level:
        if level is Level.NONE:
            break
        refusal = try_level(level)
        if not refusal:
            return Isolation(level, refusals)
        refusals[level] = refusal
    return Isolation(Level.NONE, refusals)


def try_level(level: Level) -> str:
    """Run a probe that reaches for what the level claims to contain. Empty where it got nothing, else what is wrong."""
    if sys.platform != "linux":
        return f"a sandbox needs Linux, this is {sys.platform}"
    from reasoner_ray.sandbox.program import run_program

    with tempfile.TemporaryDirectory(prefix="outside-") as folder:
        os.chmod(folder, 0o777)  # so that nothing but the sandbox stands between the probe and the file
        secret = Path(folder, "secret")
        secret.write_text("secret")
        secret.chmod(0o666)
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        probe = json.dumps([str(secret), f"{folder}/new", os.getpid(), started]).encode()
        try:
            outcome = run_program(_PROBE, {"probe.json": probe}, level=level, limits=_PROBE_LIMITS, wanted=["reached.json"])
        except EnvironmentProblem as error:
            return str(error).rpartition("set up here: ")[2]
    if outcome.status != "ok":
        return f"its probe failed: {outcome.error_type}: {outcome.detail} {outcome.stderr[-300:]}".strip()
    escaped = level.contained & set(json.loads(outcome.outputs["reached.json"]))
    return f"its probe got at {', '.join(sorted(escaped))}" if escaped else ""


def mending_command(isolation: Isolation) -> str:
    """What to do for a stronger level; empty where there is none."""
    if not isolation.refusals or sys.platform != "linux":
        return ""
    if any(f"may not read {os.__file__}" in why for why in isolation.refusals.values()):
        return f"chmod o+x every folder above {sys.prefix} and {sys.base_prefix}, so that a program without rights can start Python"
    if any(NO_OTHER_USER in why for why in isolation.refusals.values()):
        return "run as an ordinary user, or in a container with --cap-add SETUID --cap-add SETGID --cap-add KILL --cap-add SETPCAP"
    for name, bad in (
        ("kernel.apparmor_restrict_unprivileged_userns", "1"),
        ("kernel.unprivileged_userns_clone", "0"),
        ("user.max_user_namespaces", "0"),
    ):
        file = Path("/proc/sys", *name.split("."))
        if file.exists() and file.read_text().strip() == bad:
            return f"sysctl -w {name}={'10000' if name.startswith('user') else 1 - int(bad)}"
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        return "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined"
    return "Linux 5.13 or newer, with user namespaces or Landlock switched on"
