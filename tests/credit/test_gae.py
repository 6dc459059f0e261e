"""Hierarchical GAE against hand-computed cases, a double loop, and its invariants."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.credit import Credit, action_streams, hierarchical_gae
from reasoner_ray.envs.text.overcooked import TomatoSalad
from reasoner_ray.trajectory import Status, TokenStreams, Trajectory, TrajectoryBuilder, flatten
from tests.credit.streams import action_lists, make_streams, make_trajectory, random_streams, trajectory_lists

unit = st.floats(0, 1, width=32)


def gae(
    streams: TokenStreams,
    gamma_token: float,
    gamma_action: float,
    lambda_token: float,
    lambda_action: float,
    *,
    bootstrap_truncated: bool = False,
) -> Credit:
    return hierarchical_gae(
        streams,
        gamma_token=gamma_token,
        gamma_action=gamma_action,
        lambda_token=lambda_token,
        lambda_action=lambda_action,
        bootstrap_truncated=bootstrap_truncated,
    )


def double_loop(
    trajectories: list[Trajectory], streams: TokenStreams, gamma: tuple[float, float], lambda_: tuple[float, float], bootstrap: bool
) -> list[float]:
    """The reference: backward over actions, then over the tokens of each, on the trajectories themselves."""
    assert streams.values is not None and streams.bootstrap is not None
    values, out, start = streams.values.tolist(), [], 0
    for i, trajectory in enumerate(trajectories):
        spans = [s for s in trajectory.spans if s.kind == "model" and s.end > s.start]
        size = sum(s.end - s.start for s in spans)
        advantages, k = [0.0] * size, size - 1
        goes_on = trajectory.status is Status.TRUNCATED and (bootstrap or trajectory.unended)
        next_value = float(streams.bootstrap[i]) if goes_on else 0.0
        next_advantage = 0.0
        for span in reversed(spans):
            for j in reversed(range(span.start, span.end)):
                level = 1 if j == span.end - 1 else 0
                discount = gamma[1] ** span.duration if level else gamma[0]
                value = values[start + k]
                delta = float(trajectory.rewards[j]) + discount * next_value - value
                next_advantage = delta + discount * lambda_[level] * next_advantage
                advantages[k], next_value = next_advantage, value
                k -= 1
        out += advantages
        start += size
    return out


def test_poad_by_hand() -> None:
    streams = make_streams(make_trajectory([(2, 1.0), (1, 2.0)]), values=[1.0, 2.0, 4.0])
    credit = gae(streams, 1.0, 0.5, 0.5, 0.25)
    # last: 2 - 4 = -2; end of action 1: 1 + .5*4 - 2 = 1, plus .5*.25*-2; inside it: 2 - 1 = 1, plus .5*.75
    assert credit.advantages.tolist() == [1.375, 0.75, -2.0]
    assert credit.returns.tolist() == [2.375, 2.75, 2.0]


def test_ntpo_by_hand() -> None:
    streams = make_streams(make_trajectory([(2, 1.0), (1, 2.0)]), values=[1.0, 2.0, 4.0])
    # end of action 1: 1 + .5*4 - 2 + .25*-2 = .5; inside it: .5*2 - 1 = 0, plus .25*.5
    assert gae(streams, 0.5, 0.5, 0.5, 0.5).advantages.tolist() == [0.125, 0.5, -2.0]


def test_an_action_of_several_steps_by_hand() -> None:
    """Discounted by as many: the semi-Markov return."""
    streams = make_streams(make_trajectory([(2, 1.0), (1, 2.0)], durations=[3, 2]), values=[1.0, 2.0, 4.0])
    # last: 2 - 4; end of action 1: 1 + .5^3*4 - 2 = -.5, plus .5^3*.25*-2; inside it: 2 - 1 = 1, plus .5 of that
    assert gae(streams, 1.0, 0.5, 0.5, 0.25).advantages.tolist() == [0.71875, -0.5625, -2.0]
    per_action = action_streams(streams)
    assert gae(per_action, 1.0, 0.5, 1.0, 0.25).advantages.tolist() == [1 + 0.125 * 4 - 1 + 0.125 * 0.25 * -2, -2.0]


def test_what_is_trained_is_the_return_that_an_environment_of_macro_actions_reports() -> None:
    """Tomato Salad discounts single steps: the outcome of its first action (no critic, lambda 1) is the return of the episode."""
    env, source = TomatoSalad(), random.Random(3)
    for seed in range(20):
        _, info = env.reset(seed=seed)
        builder, done = TrajectoryBuilder(id="t", group_id="g", task="test"), False
        builder.add_env([1])
        while not done:
            _, reward, terminated, truncated, info = env.step(source.choice(info["admissible"]))
            builder.add_model([2, 2], [-0.5] * 2, [0] * 2)
            builder.set_duration(info["steps_taken"])
            builder.add_reward(reward)
            done = terminated or truncated
        streams = replace(flatten([builder.build()]), values=torch.zeros(builder.build().trainable_tokens))
        trained = gae(streams, 1.0, env.discount, 1.0, 1.0).advantages[0]
        assert float(trained) == pytest.approx(info["metrics"]["discounted_return"], abs=1e-5)


def test_truncation_continues_with_the_bootstrap_value_only_where_asked() -> None:
    cut = make_trajectory([(1, 1.0)], status=Status.TRUNCATED)
    finished = make_trajectory([(1, 1.0)])
    streams = make_streams(cut, finished, values=[2.0, 2.0], bootstrap=[10.0, 10.0])
    assert gae(streams, 1.0, 0.5, 1.0, 1.0, bootstrap_truncated=True).advantages.tolist() == [4.0, -1.0]
    assert gae(streams, 1.0, 0.5, 1.0, 1.0).advantages.tolist() == [-1.0, -1.0]


def test_an_episode_that_only_our_limit_ended_goes_on_with_the_bootstrap_value() -> None:
    cut, timed_out = (make_trajectory([(1, 1.0)], status=Status.TRUNCATED, unended=unended) for unended in (True, False))
    streams = make_streams(cut, timed_out, values=[2.0, 2.0], bootstrap=[10.0, 10.0])
    assert gae(streams, 1.0, 0.5, 1.0, 1.0).advantages.tolist() == [4.0, -1.0]
    without = make_streams(cut, timed_out, values=[2.0, 2.0])  # a critic that values no state after the last
    assert gae(without, 1.0, 0.5, 1.0, 1.0).advantages.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("settings_", "first"),
    [((1.0, 0.95, 0.95, 0.95), 0.277), ((0.95, 0.95, 0.95, 0.95), 0.094), ((1.0, 0.95, 1.0, 0.95), 0.815)],
    ids=["poad", "ntpo", "lambda_token=1"],
)
def test_weight_of_the_outcome_at_the_first_token_under_a_zero_critic(settings_: tuple[float, ...], first: float) -> None:
    streams = make_streams(make_trajectory([(8, 0.0), (8, 0.0), (8, 1.0)]), values=[0.0] * 24)
    advantages = gae(streams, *settings_).advantages
    assert advantages[0].item() == pytest.approx(first, abs=5e-4)
    assert advantages[-1].item() == 1.0


@settings(deadline=None, max_examples=60)
@given(trajectory_lists(), st.tuples(unit, unit), st.tuples(unit, unit), st.booleans(), st.integers(0, 100))
def test_scan_equals_the_double_loop(
    trajectories: list[Trajectory], gamma: tuple[float, float], lambda_: tuple[float, float], bootstrap: bool, seed: int
) -> None:
    streams = random_streams(trajectories, seed)
    credit = gae(streams, gamma[0], gamma[1], lambda_[0], lambda_[1], bootstrap_truncated=bootstrap)
    expected = torch.tensor(double_loop(trajectories, streams, gamma, lambda_, bootstrap))
    torch.testing.assert_close(credit.advantages, expected, atol=2e-5, rtol=1e-5)
    assert streams.values is not None
    torch.testing.assert_close(credit.returns, expected + streams.values, atol=2e-5, rtol=1e-5)


def test_scan_equals_the_double_loop_on_a_long_trajectory() -> None:
    trajectories = [make_trajectory([(700, 1.0), (1, -1.0), (1300, 0.5)]), make_trajectory([(3, 1.0)])]
    streams = random_streams(trajectories)
    expected = torch.tensor(double_loop(trajectories, streams, (1.0, 0.99), (0.999, 0.95), True))
    torch.testing.assert_close(gae(streams, 1.0, 0.99, 0.999, 0.95, bootstrap_truncated=True).advantages, expected, atol=1e-4, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(trajectory_lists(), unit, st.integers(0, 100))
def test_deltas_of_an_action_telescope_with_gamma_token_one(trajectories: list[Trajectory], gamma: float, seed: int) -> None:
    """With lambda_token = 1, lambda_action = 0 the first token's advantage is the sum of its action's deltas."""
    streams = replace(random_streams(trajectories, seed), unended=None)
    advantages = gae(streams, 1.0, gamma, 1.0, 0.0).advantages
    per_action = action_streams(streams)
    assert per_action.values is not None
    after = torch.cat([per_action.values[1:], torch.zeros(1)])
    after[per_action.trajectory_end] = 0.0
    starts = torch.cat([torch.ones(1, dtype=torch.bool), streams.action_end[:-1]])
    assert per_action.durations is not None
    expected = per_action.rewards + gamma**per_action.durations * after - per_action.values
    torch.testing.assert_close(advantages[starts], expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=8), unit, unit, st.integers(0, 100))
def test_actions_of_one_token_make_every_mode_classic_gae(rewards: list[float], gamma: float, lambda_: float, seed: int) -> None:
    streams = random_streams([make_trajectory([(1, r) for r in rewards])], seed)
    assert streams.values is not None
    values, expected, carry = [*streams.values.tolist(), 0.0], [], 0.0
    for t in reversed(range(len(rewards))):
        carry = rewards[t] + gamma * values[t + 1] - values[t] + gamma * lambda_ * carry
        expected.insert(0, carry)
    for mode in [(1.0, gamma, lambda_, lambda_), (gamma, gamma, lambda_, lambda_), (1.0, gamma, 1.0, lambda_), (0.3, gamma, 0.2, lambda_)]:
        torch.testing.assert_close(gae(streams, *mode).advantages, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(action_lists, unit, unit, st.integers(0, 100))
def test_lambda_one_is_return_minus_value(actions: list[tuple[int, float]], gamma_token: float, gamma_action: float, seed: int) -> None:
    streams = random_streams([make_trajectory(actions)], seed)
    assert streams.values is not None
    returns, carry = [], 0.0
    for length, reward in reversed(actions):
        carry = reward + gamma_action * carry
        returns.append(carry)
        for _ in range(length - 1):
            carry = gamma_token * carry
            returns.append(carry)
    expected = torch.tensor(returns[::-1])
    credit = gae(streams, gamma_token, gamma_action, 1.0, 1.0)
    torch.testing.assert_close(credit.returns, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(credit.advantages, expected - streams.values, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(trajectory_lists(), st.integers(0, 100), st.randoms(use_true_random=False))
def test_a_trajectory_has_the_same_bits_alone_and_in_any_company(trajectories: list[Trajectory], seed: int, random: object) -> None:
    streams = random_streams(trajectories, seed)
    together = gae(streams, 1.0, 0.99, 0.97, 0.95, bootstrap_truncated=True)
    order = list(range(len(trajectories)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert streams.values is not None and streams.bootstrap is not None
    shuffled = make_streams(
        *[trajectories[i] for i in order],
        values=torch.cat([streams.values[streams.trajectory_index == i] for i in order]).tolist(),
        bootstrap=streams.bootstrap[order].tolist(),
    )
    moved = gae(shuffled, 1.0, 0.99, 0.97, 0.95, bootstrap_truncated=True)
    for place, i in enumerate(order):
        mine = streams.trajectory_index == i
        alone = gae(
            make_streams(trajectories[i], values=streams.values[mine].tolist(), bootstrap=[float(streams.bootstrap[i])]),
            1.0, 0.99, 0.97, 0.95, bootstrap_truncated=True,
        )  # fmt: skip
        assert torch.equal(together.advantages[mine], alone.advantages)
        assert torch.equal(moved.advantages[shuffled.trajectory_index == place], alone.advantages)


@settings(deadline=None, max_examples=30)
@given(action_lists, st.integers(0, 6), st.integers(1, 9))
def test_environment_tokens_neither_decay_nor_swallow_credit(actions: list[tuple[int, float]], observation: int, prompt: int) -> None:
    """Longer observations, also after the last action, change nothing: the reward sits on the last trainable token."""
    plain = random_streams([make_trajectory(actions, observation=0)])
    wordy = random_streams([make_trajectory(actions, observation=observation, prompt=prompt)])
    assert torch.equal(plain.rewards, wordy.rewards)
    assert wordy.returns_per_trajectory().item() == pytest.approx(sum(r for _, r in actions), abs=1e-5)
    assert torch.equal(gae(plain, 1.0, 0.9, 0.9, 0.9).advantages, gae(wordy, 1.0, 0.9, 0.9, 0.9).advantages)


def test_outcome_of_a_trajectory_that_ends_in_environment_tokens_is_credited() -> None:
    trajectory = make_trajectory([(2, 0.0)], observation=4).with_outcome(1.0)
    assert gae(make_streams(trajectory, values=[0.0, 0.0]), 1.0, 1.0, 1.0, 1.0).advantages.tolist() == [1.0, 1.0]


def test_missing_values_are_refused() -> None:
    cut = make_trajectory([(1, 1.0)], status=Status.TRUNCATED)
    with pytest.raises(ValueError, match="needs streams.values"):
        gae(make_streams(cut), 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="needs streams.bootstrap"):
        gae(make_streams(cut, values=[0.0]), 1.0, 1.0, 1.0, 1.0, bootstrap_truncated=True)


def test_no_trajectories_and_trajectories_without_actions() -> None:
    assert gae(make_streams(values=[]), 1.0, 1.0, 1.0, 1.0).advantages.shape == (0,)
    streams = make_streams(make_trajectory([]), make_trajectory([(1, 1.0)]), make_trajectory([]), values=[0.25])
    assert gae(streams, 1.0, 1.0, 1.0, 1.0).advantages.tolist() == [0.75]


def test_action_streams_by_hand() -> None:
    streams = make_streams(make_trajectory([(2, 1.0), (1, 2.0)]), make_trajectory([(3, -1.0)]), values=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    actions = action_streams(streams)
    assert actions.rewards.tolist() == [1.0, 2.0, -1.0]
    assert actions.values is not None and actions.values.tolist() == [1.0, 3.0, 4.0]
    assert actions.behaviour_logprobs.tolist() == [-1.0, -0.5, -1.5]
    assert actions.trajectory_index.tolist() == [0, 0, 1]
    assert actions.trajectory_end.tolist() == [False, True, True]
    assert actions.action_end.all()
