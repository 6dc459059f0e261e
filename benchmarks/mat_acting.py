"""Acting of a Multi-Agent Transformer for 1,024 environments at once: keys and values kept, against the decoder run anew for each agent.

Both sides run the encoder once and give the same actions from the same noise up to rounding; the other side does for every agent what
the paper's code does, the decoder over all agents' tokens. Sides alternate. Width 64, one block, one head, five choices: the paper's
settings for its particle environments. One thread, as the jobs' rollout workers have, and as many as the machine has cores.
"""

from __future__ import annotations

import argparse
import itertools
import os
from typing import Any

import torch

from benchmarks._record import alternate, ratios, record
from reasoner_ray.agents.mat.network import MultiAgentTransformer
from reasoner_ray.agents.mat.settings import MatConfig
from reasoner_ray.envs.multi_agent.spec import ActionLayout, TeamSpec

OBSERVATION, CHOICES = 50, 5


@torch.inference_mode()
def recompute(net: MultiAgentTransformer, observations: torch.Tensor, legal: torch.Tensor, *, greedy: bool = False) -> torch.Tensor:
    """Joint actions [B, n, 1] by one pass of the whole decoder for each agent."""
    rep = net._encode(observations)
    net.value(rep)
    rows, n = rep.shape[:2]
    told, actions = torch.cat([net.head.start(rows, rep), rep.new_zeros(rows, n - 1, net.head.token)], 1), rep.new_zeros(rows, n, 1)
    for m in range(n):
        out, _ = net.decoder(told, rep)
        here, own = slice(m, m + 1), net.head.parts[m : m + 1]
        actions[:, here] = net.head.sample(out[:, here], legal[:, here], greedy=greedy, generator=None)
        net.head.logprobs(out[:, here], legal[:, here], actions[:, here], own)
        if m + 1 < n:
            told[:, m + 1 : m + 2] = net.head.tokens(actions[:, here], own)
    return actions


@torch.inference_mode()
def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--agents", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    for threads, n in itertools.product(args.threads, args.agents):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        layout = ActionLayout(choices=(CHOICES,) * n, dims=(0,) * n)
        team = TeamSpec(agents=tuple(map(str, range(n))), observation=OBSERVATION, actions=layout)
        net = MultiAgentTransformer(team, MatConfig()).eval()
        seen = torch.randn(args.environments, n, OBSERVATION), torch.ones(args.environments, n, CHOICES, dtype=torch.bool)
        same = (net.act(*seen, greedy=True).actions == recompute(net, *seen, greedy=True)).float().mean()
        sides = {"cached": lambda seen=seen, net=net: net.act(*seen), "recomputed": lambda seen=seen, net=net: recompute(net, *seen)}
        seconds = alternate(sides, args.repeats)
        which = f"{threads}_threads/{n}_agents"
        figures |= {f"{which}_{name}_s": values for name, values in seconds.items()}
        figures[f"{which}_speedup"] = ratios(seconds["recomputed"], seconds["cached"])
        figures[f"{which}_equal_greedy_actions"] = float(same)
    record("mat_acting", settings={"environments": args.environments, "width": 64, "blocks": 1}, figures=figures)


if __name__ == "__main__":
    main()
