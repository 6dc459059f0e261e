"""How often each cessation rule stops wrongly, with the filter that keeps the posterior and with the published one.

One policy (DCEE) walks; only the rule differs. The calibrated rule is fitted to episodes of other seeds, walked under `never`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks._record import record
from reasoner_ray.agents.agdc.cessation import CessationRule, make_rule
from reasoner_ray.agents.agdc.evaluate import Arena, search_metrics
from reasoner_ray.agents.agdc.launch import calibrate, make_arena
from reasoner_ray.agents.agdc.planners import PLANNERS
from reasoner_ray.agents.agdc.settings import AgdcConfig, BeliefConfig, CessationConfig

INF = math.inf
FILTERS = {"posterior": {"particles": 300}, "published": {"particles": 2000, "move": "reading", "move_steps": 1}}
RULES: dict[str, CessationConfig] = {
    "spread 0.2": CessationConfig(rule="spread", threshold=0.2),
    "spread 0.5": CessationConfig(rule="spread", threshold=0.5),
    "spread 1": CessationConfig(rule="spread", threshold=1.0),
    "deviation of x and y 0.35": CessationConfig(rule="deviation", threshold=(0.35, 0.35, INF, INF, INF, INF, INF, INF)),
    "mass 0.9": CessationConfig(rule="mass", threshold=0.9),
}
CALIBRATED = (0.8, 0.9, 0.95)


def rules_of(arena: Arena, episodes: int) -> dict[str, CessationRule]:
    """All rules for the filter of ``arena``; the calibrated ones are fitted."""
    rules = {name: make_rule(config) for name, config in RULES.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fit.json"
        calibrate(arena, PLANNERS.get("dcee")(seed=1), episodes).save(file)
        for threshold in CALIBRATED:
            rules[f"calibrated {threshold:g}"] = make_rule(CessationConfig(rule="calibrated", threshold=threshold, calibration=str(file)))
    return rules


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=500, help="each rule is judged on, the same for all")
    parser.add_argument("--fit", type=int, default=500, help="episodes that the calibrated rule is fitted to")
    args = parser.parse_args()
    agdc = AgdcConfig()
    figures: dict[str, Any] = {}
    for name, belief in FILTERS.items():
        arena = make_arena(agdc.model_copy(update={"belief": BeliefConfig.model_validate(belief)}))
        for rule_name, rule in rules_of(arena, args.fit).items():
            found = search_metrics(replace(arena, rule=rule).run(PLANNERS.get("dcee")(seed=0), args.episodes), agdc.tolerance)
            wrong = 1 - found["correct_stops"] if "correct_stops" in found else math.nan
            print(
                f"{name}, {rule_name}: {found['stop_rate']:.0%} stop, {wrong:.0%} of them wrongly, {found['steps']:.0f} steps", flush=True
            )
            figures |= {f"{name}/{rule_name}/{key}": value for key, value in found.items()}
    record("agdc_rules", settings={**vars(args), "filters": FILTERS}, figures=figures)


if __name__ == "__main__":
    main()
