"""How far planners get on source-term estimation, and policies of runs beside them: stops, right stops, way, time.

Settings: `calibrated` (random sources, estimates that err, the filter that keeps the posterior), and `published`, the one that the
lineage of AGDC's environment has (a fixed source, priors centred on the truth, its filter and its rule), noisy and without noise.
Every policy plays the same episodes. The planners play those of each run too, in its own job's setting.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks._record import record
from reasoner_ray.agents.agdc.evaluate import Arena, search_metrics
from reasoner_ray.agents.agdc.launch import make_arena
from reasoner_ray.agents.agdc.planners import PLANNERS
from reasoner_ray.agents.agdc.problem import Policy
from reasoner_ray.agents.agdc.rllib import TrainedPolicy
from reasoner_ray.agents.agdc.settings import AgdcConfig
from reasoner_ray.config import load_config, merge_trees

FIXED = {name: (value, value) for name, value in {"x": 15.5, "y": 16.6, "z": 0.0}.items()}
EXACT = {"noise": 0.0, "background": 0.0, "detection": 1.0, "threshold": 5e-10}
TAKEN_FOR = {"noise": 0.5, "background": 1e-4}  # the published filter's idea of the sensor, whatever it is
PUBLISHED: dict[str, Any] = {
    "environment": {"scene": FIXED, "prior": {"centred": True}},
    "belief": {"particles": 2000, "move": "reading", "move_steps": 1},
    "cessation": {"rule": "spread", "threshold": 0.2},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "calibrated": {"belief": {"particles": 300}, "cessation": {"rule": "spread", "threshold": 0.5}},
    "published": PUBLISHED,
    "published_without_noise": {
        **PUBLISHED,
        "environment": {**PUBLISHED["environment"], "sensor": EXACT},
        "belief": {**PUBLISHED["belief"], "sensor": {**EXACT, **TAKEN_FOR}},
    },
}
SHIFTS: dict[str, dict[str, Any]] = {
    "source": {"scene": {"x": (0, 25), "y": (0, 25)}},
    "wind": {"scene": {"wind": (3.0, 4.0)}},
    "wind_direction": {"scene": {"direction": (90.0, 360.0)}},
    "diffusivity": {"scene": {"diffusivity": (3.5, 4.5)}},
    "noise": {"sensor": {"noise": 1.0}},
    "misses": {"sensor": {"detection": 0.4}},
    "domain": {"scene": {"width": 35, "height": 35, "x": (5, 30), "y": (5, 30)}},
}
"""Outside what jobs/agdc train on. The filter goes on taking the sensor for the one of training."""


def shifted(agdc: AgdcConfig, change: dict[str, Any]) -> AgdcConfig:
    """The same agent in another world."""
    tree = agdc.model_dump()
    tree["environment"] = merge_trees(tree["environment"], change)
    tree["belief"]["sensor"] = tree["belief"]["sensor"] or agdc.environment.sensor.model_dump()
    return AgdcConfig.model_validate(tree)


def measure(arena: Arena, policies: dict[str, Policy], episodes: int, tolerance: float) -> dict[str, float]:
    """Figures of each policy, printed as they come."""
    figures: dict[str, float] = {}
    for name, policy in policies.items():
        found = search_metrics(arena.run(policy, episodes), tolerance)
        shown = ", ".join(
            f"{key} {found[key]:.3g}" for key in ("stop_rate", "correct_stops", "success", "steps", "distance") if key in found
        )
        print(f"{name}: {shown}", flush=True)
        figures |= {f"{name}/{key}": value for key, value in found.items()}
    return figures


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=500, help="each policy plays, the same for all")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--planners", nargs="*", default=["random", "infotaxis", "entrotaxis", "dcee", "oracle"])
    parser.add_argument("--shifts", nargs="*", default=[], choices=list(SHIFTS), help="also outside the range of training; with --runs")
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="folders of trained runs, each looked at in its own job's setting")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    for setting in args.settings:
        agdc = AgdcConfig.model_validate(SETTINGS[setting])
        policies: dict[str, Policy] = {name: PLANNERS.get(name)(seed=0) for name in args.planners}
        found = measure(make_arena(agdc), policies, args.episodes, agdc.tolerance)
        figures |= {f"{setting}/{name}": value for name, value in found.items()}
    for run in args.runs:
        agdc = load_config(run / "config.yaml").agdc
        for world, change in {"as_trained": {}, **{name: SHIFTS[name] for name in args.shifts}}.items():
            there = shifted(agdc, change) if change else agdc
            policies = {"trained": TrainedPolicy.load(run / "model", there)}
            policies |= {name: PLANNERS.get(name)(seed=0) for name in args.planners}
            found = measure(make_arena(there), policies, args.episodes, there.tolerance)
            figures |= {f"{run.name}/{world}/{name}": value for name, value in found.items()}
    settings = {"episodes": args.episodes, **{name: SETTINGS[name] for name in args.settings}}
    record("agdc_planners", settings=settings, figures=figures)


if __name__ == "__main__":
    main()
