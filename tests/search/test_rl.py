"""RL whose rollouts are searches (``rollout.episode: search``), from the command line to the gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_runs import Run
from tests.test_runs import job as rl_job


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("method", [("beam", {"paths": 2, "width": 2}), ("mcts_alpha", {"width": 2, "simulations": 3})], ids=lambda m: m[0])
def test_a_policy_learns_from_what_its_own_searches_choose(
    method: tuple[str, dict[str, Any]], tmp_path: Path, tiny_model_dir: Path
) -> None:
    """The chosen path of each search is a trajectory with the policy's own log-probs: engine and learner agree on them."""
    file = rl_job(tmp_path, tiny_model_dir, steps=3)
    tree = yaml.safe_load(file.read_text())
    tree["rollout"] |= {"episode": "search", "max_new_tokens": 12, "stop": ["e", "a", "t", "o", "1"]}
    tree["search"] = {"method": method[0], "settings": method[1], "separator": 3, "depth": 4}
    file.write_text(yaml.safe_dump(tree))
    run = Run(file)
    assert run.wait(400) == 0, run.log.read_text()[-3000:]
    records = run.records
    assert [r["step"] for r in records] == [1, 2, 3]
    for record in records:
        assert record["mismatch/max_abs"] < 1e-3, "a path through the tree has the log-probs of the policy"
        assert record["episode/generated"] > record["rollout/tokens_mean"], "a search costs more than the path that it chose"
        assert record["faults/groups_failed"] == 0
    assert any(r["learner/grad_norm"] > 0 for r in records)
