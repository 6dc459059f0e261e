"""Small trajectories and streams for the tests of credit, losses and algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import strategies as st

from reasoner_ray.trajectory import Status, TokenStreams, Trajectory, TrajectoryBuilder, flatten

Actions = Sequence[tuple[int, float]]
"""(number of tokens, reward at its end) of each action."""


def make_trajectory(
    actions: Actions,
    *,
    name: str = "t",
    group: str = "g",
    prompt: int = 2,
    observation: int = 1,
    status: Status = Status.FINISHED,
    durations: Sequence[int] = (),
    unended: bool = False,
) -> Trajectory:
    """A prompt, then each action followed by ``observation`` environment tokens that carry no reward; durations are 1 where not given."""
    builder = TrajectoryBuilder(id=name, group_id=group, task="test")
    builder.add_env([1] * prompt)
    for turn, (length, reward) in enumerate(actions):
        builder.add_model([2] * length, [-0.5] * length, [0] * length, turn=turn)
        builder.add_env([3] * observation, turn=turn)
        builder.add_reward(reward)
        if turn < len(durations):
            builder.set_duration(durations[turn])
    return builder.build(status, unended=unended)


def make_streams(
    *trajectories: Trajectory, values: Sequence[float] | None = None, bootstrap: Sequence[float] | None = None
) -> TokenStreams:
    """Flat streams with the critic's values [K] and bootstrap values [n]."""
    streams = flatten(trajectories)
    return replace(
        streams,
        values=torch.tensor(values, dtype=torch.float32) if values is not None else None,
        bootstrap=torch.tensor(bootstrap, dtype=torch.float32) if bootstrap is not None else None,
    )


def random_streams(trajectories: Sequence[Trajectory], seed: int = 0) -> TokenStreams:
    """Streams with random values, bootstrap values and log-probs."""
    streams = flatten(trajectories)
    generator = torch.Generator().manual_seed(seed)
    k = streams.n_tokens

    def normal(n: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(n, generator=generator)

    old = -normal(k).abs() - 0.1
    return replace(
        streams,
        values=normal(k),
        bootstrap=normal(streams.n_trajectories),
        old_logprobs=old,
        behaviour_logprobs=old + normal(k, 0.3),
        ref_logprobs=old + normal(k, 0.3),
    )


rewards = st.floats(-2, 2, width=32)
action_lists = st.lists(st.tuples(st.integers(1, 6), rewards), min_size=1, max_size=5)


@st.composite
def trajectory_lists(draw: st.DrawFn, max_size: int = 5) -> list[Trajectory]:
    """Several trajectories with actions of 1 to 6 tokens, in one of two groups, some of them truncated."""
    return [
        make_trajectory(
            draw(action_lists),
            name=f"t{i}",
            group=draw(st.sampled_from("ab")),
            observation=draw(st.integers(0, 3)),
            status=draw(st.sampled_from([Status.FINISHED, Status.TRUNCATED])),
            unended=draw(st.booleans()),
            durations=draw(st.lists(st.integers(0, 4), max_size=5)),
        )
        for i in range(draw(st.integers(1, max_size)))
    ]
