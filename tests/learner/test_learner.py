"""One learner rank in this process: updates do not depend on how they are cut, stops and checkpoints keep every bit."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reasoner_ray.algorithms import get_algorithm
from reasoner_ray.config import JobConfig
from reasoner_ray.errors import CheckpointError, NonFiniteError
from reasoner_ray.learner.learner import Learner
from reasoner_ray.learner.model import load_policy
from reasoner_ray.losses import Denominators, gather_inputs, trainable_weights
from reasoner_ray.packing import pack
from reasoner_ray.trajectory import Trajectory, flatten

Job = Callable[..., JobConfig]
Groups = list[list[Trajectory]]


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Copies of every trained parameter, whole."""
    trained = {n: p for n, p in learner.engine.policy.named_parameters() if p.requires_grad}
    with learner.engine.gathered(trained.values()):
        return {n: p.detach().clone() for n, p in trained.items()}


def train(config: JobConfig, groups: Groups, steps: int = 2) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights and last metrics after ``steps`` steps on the same groups."""
    learner = Learner(config)
    for _ in range(steps):
        metrics = learner.train_step(groups)
    return weights(learner), metrics


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    """``atol`` must be a good part of lr: AdamW turns the rounding of a gradient near 0 into steps of that order."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


CASES: dict[str, dict[str, Any]] = {
    "poad-single-pass": {"name": "poad", "settings": {"normalize_advantages": False, "bootstrap_truncated": True}},
    "poad-normalised": {"name": "poad", "settings": {"normalize_advantages": True}},
    "ppo_action": {"name": "ppo_action"},
    "grpo-kl": {"name": "grpo", "settings": {"kl_coef": 0.1, "entropy_coef": 0.01, "loss_average": "sequence"}},
    "rloo-kl-in-reward": {"name": "rloo", "settings": {"kl_coef": 0.1, "kl_in": "reward"}},
}


@pytest.mark.parametrize("case", CASES)
def test_update_does_not_depend_on_micro_batches(case: str, job: Job, groups: Groups) -> None:
    lr = {"lr": 1e-4, "critic_lr": 1e-4}
    expected, expected_metrics = train(job(algorithm=CASES[case], learner=lr), groups)
    for budget, share in ((40, True), (40, False), (120, True)):
        cut = {"tokens_per_microbatch": budget, "share_prefixes": share}
        got, metrics = train(job(algorithm=CASES[case], learner=lr | cut), groups)
        assert metrics["learner/micro_batches"] > 1
        assert_same(got, expected, 1e-5)
        for key in ("learner/grad_norm", "learner/loss", "learner/entropy", "mismatch/k3"):
            assert metrics[key] == pytest.approx(expected_metrics[key], abs=1e-5, rel=1e-4)


@pytest.mark.parametrize(("case", "budget"), [("poad-single-pass", 100), ("poad-normalised", 4096), ("grpo-kl", 100)])
def test_single_pass_equals_two_passes(case: str, budget: int, job: Job, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for expected_forwards in (1, 2):
        learner = Learner(job(algorithm=CASES[case], learner={"tokens_per_microbatch": budget}))
        if expected_forwards == 2:
            monkeypatch.setattr(learner, "_fits_single_pass", lambda updates, trajectories: False)
        forwards: list[int] = []
        learner.engine.policy.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        metrics = learner.train_step(groups)
        assert len(forwards) == expected_forwards * metrics["learner/micro_batches"]
        results.append((weights(learner), metrics["mismatch/mean_abs"], metrics["learner/grad_norm"]))
    assert_same(results[0][0], results[1][0], 1e-6)
    assert results[0][1:] == pytest.approx(results[1][1:], rel=1e-5)


@pytest.mark.parametrize(("case", "learner"), [("poad-normalised", {"tokens_per_microbatch": 100}), ("grpo-kl", {"updates_per_step": 2})])
def test_steps_that_need_two_passes(case: str, learner: dict[str, int], job: Job, groups: Groups) -> None:
    """Whitening over several micro-batches, and several updates, need the whole step before the first gradient."""
    trained = Learner(job(algorithm=CASES[case], learner=learner))
    forwards: list[int] = []
    trained.engine.policy.register_forward_hook(lambda *_: forwards.append(1))
    metrics = trained.train_step(groups)
    assert len(forwards) == 2 * metrics["learner/micro_batches"]


def test_update_equals_plain_torch(job: Job, groups: Groups) -> None:
    """No factor is hidden in DeepSpeed: the same gradient norm and weights as autograd and AdamW by hand."""
    config = job(algorithm={"name": "grpo"}, learner={"critic": "none", "max_grad_norm": 0.5, "lr": 1e-4})
    learner = Learner(config)
    metrics = [learner.train_step(groups) for _ in range(2)]

    policy = load_policy(config.model, config.learner)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, betas=config.learner.betas, weight_decay=0.0)
    algorithm = get_algorithm("grpo")
    settings = algorithm.settings({})
    trajectories = [t for group in groups for t in group]
    streams = flatten(trajectories)
    credit, ones = algorithm.credit(streams, settings), trainable_weights(streams)
    (batch,) = pack(trajectories, tokens_per_microbatch=10_000)
    for step in range(2):
        out = policy(batch)
        inputs = gather_inputs(
            streams,
            credit,
            ones,
            batch.stream_index,
            Denominators.of(streams, ones),
            logprobs=out.logprobs,
            entropy=out.entropy,
            values=None,
        )
        optimizer.zero_grad()
        algorithm.loss(inputs, settings).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
        assert metrics[step]["learner/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert_same(weights(learner), {n: p.detach() for n, p in policy.named_parameters()}, 1e-5)


def test_several_updates_and_epochs(job: Job, groups: Groups) -> None:
    learner = Learner(job(algorithm={"name": "poad"}, learner={"updates_per_step": 2, "epochs": 3}))
    metrics = learner.train_step(groups)
    assert metrics["learner/approx_kl"] > 0  # pi_old stays the policy before the step
    assert all(math.isfinite(v) for v in metrics.values())
    with pytest.raises(ValueError, match="3 groups do not divide"):
        learner.train_step(groups[:3])


def test_learns(job: Job, groups: Groups) -> None:
    """Rewarded tokens become likelier, and the critic learns the returns."""
    learner = Learner(job(algorithm={"name": "poad"}, learner={"lr": 1e-3, "critic_lr": 1e-2}))
    trajectories = [t for group in groups for t in group]
    returns = torch.tensor([t.total_reward for t in trajectories])
    owner = flatten(trajectories).trajectory_index
    before = learner.logprobs(trajectories)
    first = [learner.train_step(groups) for _ in range(12)][-1]
    gain = torch.zeros(len(returns)).index_add(0, owner, learner.logprobs(trajectories) - before)
    assert torch.corrcoef(torch.stack([gain, returns]))[0, 1] > 0.5
    assert first["learner/explained_variance"] > 0.2


def test_unusable_tokens_and_trajectories(job: Job, groups: Groups) -> None:
    """A NaN behaviour log-prob drops its token, a failed trajectory is not trained on."""
    from reasoner_ray.trajectory import Status

    broken = [list(group) for group in groups]
    logprobs = broken[0][0].behaviour_logprobs.copy()
    logprobs[np.flatnonzero(broken[0][0].loss_mask)[0]] = np.nan
    broken[0][0] = replace(broken[0][0], behaviour_logprobs=logprobs)
    broken[1][1] = broken[1][1].with_status(Status.FAILED)
    metrics = Learner(job(algorithm={"name": "poad"})).train_step(broken)
    assert metrics["learner/tokens_dropped"] == 1
    total = sum(t.trainable_tokens for group in groups for t in group)
    assert metrics["learner/tokens_trained"] == total - 1 - groups[1][1].trainable_tokens
    assert all(math.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_stops_with_the_batch_saved(what: str, stage: int, job: Job, groups: Groups) -> None:
    config = job(algorithm={"name": "poad"}, learner={"zero_stage": stage})
    learner = Learner(config)
    learner.train_step(groups)
    before = weights(learner)
    bad = [list(group) for group in groups]
    if what == "loss":
        bad[2][1] = bad[2][1].with_outcome(math.inf)
    else:
        learner.engine.policy.head.register_full_backward_hook(
            lambda module, grads, _: tuple(None if g is None else g * math.nan for g in grads)
        )
    with pytest.raises(NonFiniteError, match="nonfinite") as caught:
        learner.train_step(bad)
    assert_same(weights(learner), before, 0)
    (saved,) = (config.run_dir / "nonfinite").iterdir()
    assert str(saved) in str(caught.value)
    content = torch.load(saved, weights_only=False)
    assert [t.id for t in content["trajectories"]] == [t.id for group in bad for t in group]
    if what == "loss":
        assert not all(map(math.isfinite, content["losses"]))


def test_learning_rates(job: Job, groups: Groups) -> None:
    """The critic has a rate of its own; both warm up linearly."""
    learner = Learner(job(algorithm={"name": "poad"}, learner={"lr": 1e-9, "critic_lr": 1e-2, "warmup_steps": 4}))
    before = weights(learner)
    rates = [learner.train_step(groups)["learner/critic_lr"] for _ in range(5)]
    assert rates == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2])
    moved = {n: float((w - before[n]).abs().max()) for n, w in weights(learner).items()}
    assert all((m > 1e-3) == n.startswith("value_head") for n, m in moved.items() if "weight" in n), moved


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_critic_that_warms_up_leaves_the_policy_alone(stage: int, job: Job, groups: Groups) -> None:
    learning = {"lr": 1e-3, "critic_lr": 1e-2, "critic_warmup": 1, "epochs": 2, "zero_stage": stage}
    learner = Learner(job(algorithm={"name": "poad"}, learner=learning))

    def moved_by_a_step() -> tuple[bool, bool, float]:
        """Whether policy and critic changed, and the learning rate that was told."""
        before = weights(learner)
        metrics = learner.train_step(groups)
        changed = {n for n, w in weights(learner).items() if not torch.equal(w, before[n])}
        critics = {n for n in changed if n.startswith("value_head")}
        return bool(changed - critics), bool(critics), metrics["learner/lr"]

    assert moved_by_a_step() == (False, True, 0.0)
    assert moved_by_a_step() == (True, True, pytest.approx(1e-3))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_policy_that_has_gone_far_enough_waits_for_its_critic(stage: int, job: Job, groups: Groups) -> None:
    """max_kl: the first pass is at KL 0 and moves the policy; at the second it is away, and the critic alone goes on."""

    moments: list[list[torch.Tensor]] = []

    def after(**learning: object) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        learner = Learner(job(algorithm={"name": "poad"}, learner={"lr": 1e-3, "critic_lr": 1e-2, "zero_stage": stage, **learning}))
        metrics = learner.train_step(groups)
        optimizer = learner.engine._engine.optimizer
        moments.append([optimizer.state[p]["exp_avg"].clone() for p in optimizer.param_groups[0]["params"]])
        return weights(learner), metrics

    once, _ = after(epochs=1)
    held, metrics = after(epochs=2, max_kl=1e-9)
    twice, free = after(epochs=2, max_kl=100.0)
    for first, kept, gone_on in zip(*moments, strict=True):  # what was held moves the policy in no later step either
        torch.testing.assert_close(kept, first, atol=1e-12, rtol=1e-6)
        assert not torch.allclose(gone_on, first, atol=1e-12, rtol=1e-3)
    critic = {name for name in once if name.startswith("value_head")}
    assert_same({n: w for n, w in held.items() if n not in critic}, {n: w for n, w in once.items() if n not in critic}, 0)
    assert all(not torch.equal(held[n], once[n]) for n in critic if "weight" in n)
    assert any(not torch.equal(twice[n], once[n]) for n in once if n not in critic)
    assert (metrics["learner/policy_held"], free["learner/policy_held"]) == (0.5, 0.0)


@pytest.mark.parametrize("critic", ["shared", "frozen", "separate"])
@pytest.mark.parametrize("stage", [0, 3])
def test_critic_variants(critic: str, stage: int, job: Job, groups: Groups) -> None:
    learner = Learner(job(algorithm=CASES["poad-single-pass"], learner={"critic": critic, "zero_stage": stage}))
    before = weights(learner)
    metrics = [learner.train_step(groups) for _ in range(3)][-1]
    assert metrics["learner/value_loss"] > 0
    assert all(not torch.equal(w, before[n]) for n, w in weights(learner).items() if not n.endswith("bias"))


@pytest.mark.parametrize("stage", [0, 3])
def test_lora_trains_adapters_only(stage: int, job: Job, groups: Groups, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = job(algorithm={"name": "poad", "settings": {"kl_coef": 0.01}}, learner={"lora": {"rank": 4}, "zero_stage": stage, "lr": 1e-2})
    learner = Learner(config)
    original = {n: t.clone() for n, t in learner.state_for_sync()}
    for _ in range(2):
        learner.train_step(groups)
    assert all("lora_" in n or n.startswith("value_head") for n in weights(learner))
    merged = {n: t.clone() for n, t in learner.state_for_sync()}
    assert merged.keys() == original.keys()
    assert any(not torch.equal(merged[n], original[n]) for n in merged)

    learner.export(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) > 0
    trajectory = groups[0][0]
    with torch.no_grad():
        logits = model(torch.from_numpy(trajectory.tokens.astype(np.int64))[None]).logits[0]
    index = np.flatnonzero(trajectory.loss_mask)
    expected = torch.log_softmax(logits, -1)[index - 1, trajectory.tokens[index]]
    torch.testing.assert_close(learner.logprobs([trajectory]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bit_equal(stage: int, job: Job, groups: Groups, tmp_path: Path) -> None:
    config = job(algorithm={"name": "poad"}, learner={"zero_stage": stage, "warmup_steps": 10})
    learner = Learner(config)
    for _ in range(2):
        learner.train_step(groups)
    learner.save(tmp_path / "state")
    draw = torch.rand(3)
    metrics = learner.train_step(groups)
    expected = weights(learner)

    resumed = Learner(config)
    resumed.load(tmp_path / "state")
    assert torch.equal(torch.rand(3), draw)
    got = resumed.train_step(groups)
    assert_same(weights(resumed), expected, 0)
    timed = {"learner/seconds", "learner/tokens_per_s"}
    assert {k: v for k, v in got.items() if k not in timed} == {k: v for k, v in metrics.items() if k not in timed}
    learner.load(tmp_path / "state")  # a learner that has moved on can go back, too
    learner.train_step(groups)
    assert_same(weights(learner), expected, 0)


def test_damaged_and_foreign_checkpoints(job: Job, groups: Groups, tmp_path: Path) -> None:
    config = job(algorithm={"name": "poad"})
    learner = Learner(config)
    learner.train_step(groups)
    learner.save(tmp_path)
    with pytest.raises(CheckpointError, match="zero_stage=0"):
        Learner(job(algorithm={"name": "poad"}, learner={"zero_stage": 1})).load(tmp_path)
    with pytest.raises(CheckpointError, match="value_head.*check model.path"):
        Learner(job(algorithm={"name": "poad"}, learner={"critic_hidden": [8]})).load(tmp_path)
    before = weights(learner)
    file = tmp_path / "rank-00000.pt"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a checkpoint"):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="corrupt checkpoint"):
            learner.load(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="corrupt checkpoint"):
        learner.load(tmp_path)
    assert_same(weights(learner), before, 0)


def test_full_disk_is_an_os_error(job: Job, tmp_path: Path) -> None:
    (tmp_path / "rank-00000.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"(?i)no space|write"):
        Learner(job(algorithm={"name": "grpo"})).save(tmp_path)


def test_full_disk_at_the_export_is_an_os_error(job: Job, tmp_path: Path) -> None:
    learner = Learner(job(algorithm={"name": "grpo"}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            learner.export(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_mismatch_of_a_probe(job: Job, groups: Groups) -> None:
    learner = Learner(job(algorithm={"name": "grpo"}))
    trajectories = groups[0]
    ours = learner.logprobs(trajectories).split([t.trainable_tokens for t in trajectories])
    exact = []
    for trajectory, logprobs in zip(trajectories, ours, strict=True):
        behaviour = trajectory.behaviour_logprobs.copy()
        behaviour[trajectory.loss_mask] = logprobs.numpy()
        exact.append(replace(trajectory, behaviour_logprobs=behaviour))
    agreed = learner.mismatch(exact)
    assert agreed["max_abs"] < 1e-6 and agreed["tokens"] == sum(t.trainable_tokens for t in trajectories)
    assert learner.mismatch(trajectories)["mean_abs"] > 0.1


def test_sampling_temperature_is_that_of_the_rollout(job: Job, groups: Groups) -> None:
    plain, warm = Learner(job(algorithm={"name": "grpo"})), Learner(job(algorithm={"name": "grpo"}, rollout={"temperature": 2.0}))
    assert not torch.allclose(plain.logprobs(groups[0]), warm.logprobs(groups[0]))
