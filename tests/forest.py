"""Trajectories that share prefixes in the ways that training meets, for the tests of packing and of the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from hypothesis import strategies as st

from reasoner_ray.trajectory import Status, Trajectory, TrajectoryBuilder

Turns = Sequence[tuple[Sequence[int], Sequence[int]]]  # (observation, action) of each turn


def trajectory(
    turns: Turns, *, group: str = "g", status: Status = Status.FINISHED, tail: Sequence[int] = (), forgets: Collection[int] = ()
) -> Trajectory:
    """A trajectory of the given turns; ``tail`` is a last observation that nothing answers; turns in ``forgets`` see no earlier one."""
    builder = TrajectoryBuilder(id="t", group_id=group, task="test")
    for turn, (observation, action) in enumerate(turns):
        builder.add_env(observation, turn=turn, new_context=turn in forgets)
        builder.add_model(action, [-1.0] * len(action), [0] * len(action), turn=turn)
    if tail:
        builder.add_env(tail, turn=len(turns))
    return builder.build(status)


def answers(seed: int, n: int, length: int, vocabulary: int = 512) -> list[list[int]]:
    """``n`` random token lists."""
    return np.random.default_rng(seed).integers(0, vocabulary, (n, length)).tolist()


def group_of_samples() -> list[Trajectory]:
    """Eight answers to one prompt."""
    prompt = answers(0, 1, 20)[0]
    return [trajectory([(prompt, answer)]) for answer in answers(1, 8, 5)]


def identical_samples() -> list[Trajectory]:
    """The same answer three times, and once cut by a limit."""
    prompt, answer = answers(2, 1, 9)[0], answers(3, 1, 4)[0]
    return [trajectory([(prompt, answer)]) for _ in range(3)] + [trajectory([(prompt, answer)], status=Status.TRUNCATED)]


def same_state() -> list[Trajectory]:
    """Episodes of two groups that meet the same states for two turns, then part."""
    first, second = answers(4, 2, 6), answers(5, 2, 5)
    shared = [(first[0], first[1]), (second[0], second[1])]
    ends = answers(6, 4, 7)
    return [trajectory([*shared, (end[:3], end[3:])], group=str(i % 2)) for i, end in enumerate(ends)]


def multi_turn() -> list[Trajectory]:
    """Episodes of one to four turns from two starts, one ending in an observation and cut there."""
    parts = answers(7, 16, 4)
    return [
        trajectory([(parts[0], parts[1])]),
        trajectory([(parts[0], parts[1]), (parts[2], parts[3])]),
        trajectory([(parts[0], parts[4]), (parts[5], parts[6]), (parts[7], parts[8]), (parts[9], parts[10])]),
        trajectory([(parts[11], parts[12]), (parts[13], parts[14])], group="h", status=Status.TRUNCATED, tail=parts[15]),
    ]


def tree_paths() -> list[Trajectory]:
    """All root-to-leaf paths of a search tree: three steps, two branches a step, each step one action."""
    prompt = answers(8, 1, 6)[0]
    steps = answers(9, 14, 3)
    paths = [(a, 2 + 2 * a + b, 6 + 4 * a + 2 * b + c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    return [trajectory([(prompt, steps[a]), ((), steps[b]), ((), steps[c])]) for a, b, c in paths]


def alone() -> list[Trajectory]:
    """One trajectory: a chain."""
    return [trajectory([(answers(10, 1, 12)[0], answers(11, 1, 6)[0])], status=Status.TRUNCATED)]


def forgetful() -> list[Trajectory]:
    """Episodes of two groups that see one turn at a time and meet the same observations."""
    seen = answers(12, 3, 5)
    moves = answers(13, 8, 3)
    return [
        trajectory([(seen[0], moves[0]), (seen[1], moves[1]), (seen[0], moves[2])], forgets=(1, 2)),
        trajectory([(seen[0], moves[3]), (seen[2], moves[4])], forgets=(1,), group="h", status=Status.TRUNCATED, tail=seen[1]),
        trajectory([(seen[1], moves[5]), (seen[2], moves[6]), (seen[0], moves[7])], forgets=(2,)),
    ]


CASES = {f.__name__: f for f in (group_of_samples, identical_samples, same_state, multi_turn, tree_paths, alone, forgetful)}


@st.composite
def forests(draw: st.DrawFn, max_size: int = 10, vocabulary: int = 3) -> list[Trajectory]:
    """Random trajectories over so small a vocabulary that they share many prefixes; some have nothing to train on."""
    token = st.integers(0, vocabulary - 1)
    first = st.lists(token, min_size=1, max_size=5)
    span = st.lists(token, max_size=4)
    made = []
    for _ in range(draw(st.integers(1, max_size))):
        turns = [(draw(first), draw(span)), *draw(st.lists(st.tuples(span, span), max_size=2))]
        status = draw(st.sampled_from([Status.FINISHED, Status.TRUNCATED]))
        forgets = [turn for turn, (observation, _) in enumerate(turns) if turn and observation and draw(st.booleans())]
        made.append(trajectory(turns, group=draw(st.sampled_from("abc")), status=status, tail=draw(span), forgets=forgets))
    return made
