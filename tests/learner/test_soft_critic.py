"""The soft critic: its terms and gradients equal a plain computation, and a learner trains and resumes with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from reasoner_ray.algorithms import get_algorithm
from reasoner_ray.config import JobConfig, ModelConfig
from reasoner_ray.credit import Credit
from reasoner_ray.learner.learner import Learner
from reasoner_ray.learner.model import PolicyModel, load_policy
from reasoner_ray.learner.settings import LearnerConfig
from reasoner_ray.learner.soft_critic import Logits, SoftCritic, TokenModel
from reasoner_ray.losses import Denominators, gather_inputs
from reasoner_ray.packing import Batch, pack, unpack
from reasoner_ray.trajectory import Trajectory, TrajectoryBuilder, flatten
from tests.credit.threads import one_thread
from tests.forest import CASES
from tests.learner.test_choice_rows import episode, episodes

__all__ = ["one_thread"]

TEMPERATURE = 0.8
TERMS = ("kl", "q", "expected_q", "target_q")
Load = Callable[..., PolicyModel]
Terms = dict[str, torch.Tensor]
Job = Callable[..., JobConfig]
Groups = list[list[Trajectory]]


def move(module: nn.Module, seed: int, size: float = 0.03) -> None:
    """Add noise to every parameter; of ``size`` 0.03 it is a third of the weights' size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def load(tiny_model_dir: Path) -> Load:
    """Loads the tiny model with a soft critic."""

    def make(dtype: str = "float32", temperature: float = TEMPERATURE, **changes: Any) -> PolicyModel:
        learner = LearnerConfig(**{"critic": "soft_q", "logprob_chunk": 3, **changes})
        return load_policy(ModelConfig(path=str(tiny_model_dir), dtype=dtype), learner, temperature=temperature)

    return make


@pytest.fixture(scope="module", params=["soft_q", "soft_q_frozen"])
def moved(load: Load, request: pytest.FixtureRequest) -> PolicyModel:
    """Policy, Q network and target have all left the initial model, each for elsewhere."""
    policy = load(critic=request.param)
    assert policy.soft_critic is not None
    for seed, part in enumerate((policy.lm, policy.soft_critic.q, policy.soft_critic.target)):
        move(part, seed, 0.03 if part is policy.lm or request.param == "soft_q" else 1.0)
    return policy


def some_trajectories(name: str) -> list[Trajectory]:
    return episodes(forget=name == "lists") if "lists" in name else CASES[name]()


def total(terms: Terms) -> torch.Tensor:
    """A weighted sum in which every gradient of every token shows."""
    k = torch.arange(len(terms["q"])) + 1.0
    return (torch.sin(k) * terms["q"] + torch.cos(k) * terms["expected_q"] + torch.sin(2 * k) * terms["kl"]).sum()


def packed(policy: PolicyModel, trajectories: list[Trajectory], **how: Any) -> tuple[Terms, dict[str, torch.Tensor]]:
    """The terms in the order of ``flatten``, and the gradients of ``total`` by parameter."""
    policy.zero_grad()
    batches, n = pack(trajectories, **how), flatten(trajectories).n_tokens
    outs = [policy(batch).soft for batch in batches]
    place = torch.cat([batch.stream_index for batch in batches])
    in_order = {name: torch.cat([getattr(out, name) for out in outs])[torch.argsort(place)] for name in TERMS}
    total(in_order).backward()
    terms = {name: unpack(batches, [getattr(out, name) for out in outs], n) for name in TERMS}
    return terms, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def separate(folder: Path, policy: PolicyModel) -> list[Any]:
    """Policy, initial model, Q network and target, each as a model of its own by transformers."""
    lms, critic = list[Any](), policy.soft_critic
    for lm, part in ((policy.lm, None), (policy.initial, None), (critic.q.lm, critic.q), (critic.target.lm, critic.target)):
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        own.load_state_dict((lm or policy.initial).state_dict())
        if lm is None:  # a frozen critic, whose trunk is the initial model's
            head = nn.Linear(*reversed(part.own.shape), bias=False)
            head.weight = nn.Parameter(policy.initial.get_output_embeddings().weight + part.shared + 0.1 * part.own)
            own.requires_grad_(False).set_output_embeddings(head)
        lms.append(own)
    return lms


def gradients(critic: Any, lms: list[Any]) -> dict[str, torch.Tensor]:
    """Those that ``separate`` models got, under the names of the policy's parameters."""
    grads = {f"lm.{n}": p.grad for n, p in lms[0].named_parameters()}
    if critic.q.lm is not None:
        grads |= {f"soft_critic.q.lm.{n}": p.grad for n, p in lms[2].named_parameters()}
    else:
        by_row = lms[2].get_output_embeddings().weight.grad
        grads |= {"soft_critic.q.own": 0.1 * by_row, "soft_critic.q.shared": by_row.sum(0)}
    for n, p in critic.q.stop.named_parameters():
        grads[f"soft_critic.q.stop.{n}"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return grads


def plain(folder: Path, policy: PolicyModel, trajectories: list[Trajectory]) -> tuple[Terms, dict[str, torch.Tensor]]:
    """The same from whole logits by transformers, each context and each candidate a forward pass of its own."""
    lms, critic = separate(folder, policy), policy.soft_critic

    def rows(tokens: list[int], start: int) -> tuple[torch.Tensor, ...]:
        """Log-probs of policy and reference, Q and target [n, V] of the positions that predict ``tokens[start:]``.

        Then what a stop adds to Q and target where it comes before ``tokens[start:]``, [n].
        """
        outs = [lm(torch.tensor([tokens]), output_hidden_states=True) for lm in lms]
        pi, rho, q, target = (out.logits[0, start - 1 : -1] for out in outs)
        stops = [part.stop(out.hidden_states[-1][0, start - 1 : -1]) for part, out in zip((critic.q, critic.target), outs[2:], strict=True)]
        logprobs = [(x / TEMPERATURE).log_softmax(-1) for x in (pi, rho)]
        return *logprobs, q - rho.detach(), (target - rho).detach(), stops[0], stops[1].detach()

    found: dict[str, list[torch.Tensor]] = {name: [] for name in TERMS}

    def note(log_pi: torch.Tensor, log_rho: torch.Tensor, q: torch.Tensor, target: torch.Tensor, chosen: int) -> None:
        pi = log_pi.exp()
        values = ((pi * (log_pi - log_rho.detach())).sum(), q[chosen], (pi * q.detach()).sum(), (pi * target).sum().detach())
        for name, value in zip(TERMS, values, strict=True):
            found[name].append(value)

    for t in trajectories:
        for span in (s for s in t.spans if s.kind == "model"):
            before = t.tokens[span.context_start : span.start].tolist()
            if span.choice is None:
                action = t.tokens[span.start : span.end].tolist()
                for parts in zip(*rows(before + action, len(before))[:4], action, strict=True) if action else ():
                    note(*parts)
                continue
            candidates, divisors = span.choice.candidates, torch.tensor(span.choice.divisors)
            whole = [rows([*before, *c], len(before)) for c in candidates]
            each = [[x[range(len(c)), list(c)] for x in parts[:4]] for c, parts in zip(candidates, whole, strict=True)]
            masses = [(torch.stack([x[which].sum() for x in each]) / divisors).softmax(0) for which in (0, 1)]
            for j in range(len(span.choice.tokens)):
                ways: dict[tuple[int, bool], list[int]] = {}  # (token, does it end the candidate) -> candidates
                for i, c in enumerate(candidates):
                    if len(c) > j and c[:j] == span.choice.tokens[:j]:
                        ways.setdefault((c[j], j == len(c) - 1), []).append(i)
                log_pi, log_rho = (torch.stack([mass[i].sum() for i in ways.values()]).log() for mass in masses)
                q, target = (torch.stack([each[i[0]][which][j] for i in ways.values()]) for which in (2, 3))
                for n, (token, ends) in enumerate(ways):
                    if ends and (token, False) in ways:
                        one, longer = torch.eye(len(ways))[n], whole[ways[token, False][0]]
                        q, target = q + one * longer[4][j + 1], target + one * longer[5][j + 1]
                own = list(ways).index((span.choice.tokens[j], j == len(span.choice.tokens) - 1))
                note(log_pi - log_pi.logsumexp(0), log_rho - log_rho.logsumexp(0), q, target, own)
    terms = {name: torch.stack(values) for name, values in found.items()}
    total(terms).backward()
    return {name: x.detach() for name, x in terms.items()}, gradients(critic, lms)


def assert_close(got: tuple[Terms, Terms], expected: tuple[Terms, Terms]) -> None:
    for name in TERMS:
        torch.testing.assert_close(got[0][name], expected[0][name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("name", ["lists", "lists with history", "group_of_samples", "multi_turn", "forgetful"])
def test_terms_and_gradients_equal_a_plain_computation(name: str, moved: PolicyModel, tiny_model_dir: Path) -> None:
    trajectories = some_trajectories(name)
    moved.zero_grad()
    expected = plain(tiny_model_dir, moved, trajectories)
    assert all(float(x.abs().max()) > 0.1 for x in expected[0].values())
    for budget, share in ((1000, True), (1000, False), (25, True), (40, False)):
        assert_close(packed(moved, trajectories, tokens_per_microbatch=budget, share_prefixes=share), expected)


class Table(nn.Module):
    """A language model whose logits in each state are free numbers."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def get_output_embeddings(self) -> nn.Module:
        head = nn.Linear(self.logits.shape[1], self.logits.shape[1], bias=False)
        head.weight = nn.Parameter(torch.eye(self.logits.shape[1]))
        return head


def actor_gradient(beta: float, pi: torch.Tensor, rho: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """That of etpo's loss by the policy's logits [N, V], for a prompt of one token and an answer of N."""
    builder = TrajectoryBuilder(id="t", group_id="g", task="test")
    builder.add_env([0])
    builder.add_model(list(range(len(pi))), [-1.0] * len(pi), [0] * len(pi))
    trajectory = builder.build()
    (batch,) = pack([trajectory], tokens_per_microbatch=100)
    critic = SoftCritic(Table(q + rho), 1.0, 2)  # type: ignore[arg-type]
    logits, eye = pi.clone().requires_grad_(), torch.eye(pi.shape[1])
    policy, reference = (TokenModel(Logits(x, eye, None), None) for x in (logits, rho))
    soft = critic(batch, lambda lm: lm.logits, policy, reference, want_q=True, want_target=False)
    streams, etpo = flatten([trajectory]), get_algorithm("etpo")
    ones = torch.ones(streams.n_tokens)
    inputs = gather_inputs(
        streams,
        Credit(advantages=ones, returns=ones),
        ones,
        batch.stream_index,
        Denominators.of(streams, ones),
        logprobs=-ones,
        entropy=None,
        values=None,
        q=soft.q,
        expected_q=soft.expected_q,
        kl=soft.kl,
    )
    etpo.loss(inputs, etpo.settings({"beta": beta})).loss.backward()
    assert critic.q.lm.logits.grad is not None and soft.target_q is None
    assert logits.grad is not None
    return logits.grad


def test_the_policys_gradient_is_an_expectation_under_the_policy() -> None:
    """The public code takes the mean of ``beta log pi - Q`` over the vocabulary instead, which no Q can move."""
    beta, (pi, rho, q, other) = 0.3, torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(2)).unbind(0)
    got = actor_gradient(beta, pi, rho, q)
    logits = pi.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    formula = (log_pi.exp() * (beta * (log_pi - rho.log_softmax(-1)) - q)).sum(-1).mean()
    torch.testing.assert_close(got, torch.autograd.grad(formula, logits)[0], rtol=1e-5, atol=1e-6)

    # By hand: pi (a - E_pi[a]) with a = beta log(pi / rho) - Q
    a = beta * (pi.log_softmax(-1) - rho.log_softmax(-1)) - q
    weights = pi.softmax(-1)
    torch.testing.assert_close(got, weights * (a - (weights * a).sum(-1, keepdim=True)) / 5, rtol=1e-5, atol=1e-6)

    log_pi = logits.log_softmax(-1)
    unweighted = [torch.autograd.grad((beta * log_pi - x).mean(-1).mean(), logits, retain_graph=True)[0] for x in (q, other)]
    torch.testing.assert_close(*unweighted)
    assert (got - actor_gradient(beta, pi, rho, other)).abs().max() > 0.01 and (got - unweighted[0]).abs().max() > 0.01


def test_an_edge_finds_its_pair_in_any_row() -> None:
    """The token of ``choice_pairs[edge_token]`` is the edge's own, and its state is that of the other edges of the node."""
    for share in (True, False):
        (batch,) = pack(episodes(forget=True), tokens_per_microbatch=1000, share_prefixes=share)
        forest = batch.choices
        assert forest is not None and batch.choice_pairs is not None
        of_edge = batch.choice_pairs[forest.edge_token]
        of_member = batch.choice_pairs  # members of edges come in the order of the candidates' tokens
        assert torch.equal(batch.targets[of_edge][forest.member_edge], batch.targets[of_member])
        depth = batch.position_ids[batch.predictors]
        assert torch.equal(depth[of_edge][forest.member_edge], depth[of_member])
        assert not share or torch.equal(of_edge[forest.member_edge], of_member)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["lists", "multi_turn"])
def test_everything_starts_at_zero(dtype: str, name: str, load: Load) -> None:
    """Also in bfloat16, whose own rounding is a thousand times what is allowed: all four models round the same weights alike."""
    with torch.no_grad():
        soft = load(dtype)(pack(some_trajectories(name), tokens_per_microbatch=1000)[0]).soft
    for term in TERMS:
        assert float(getattr(soft, term).abs().max()) < 2e-5, term


def test_no_logits_outlive_a_chunk(moved: PolicyModel) -> None:
    """What is kept for the backward pass has no row of the vocabulary's length but the heads' weights."""
    batch = pack(CASES["multi_turn"](), tokens_per_microbatch=1000)[0]
    kept: list[torch.Tensor] = []
    original = SoftCritic.forward

    def watched(self: SoftCritic, *args: Any, **wants: bool) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            return original(self, *args, **wants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SoftCritic, "forward", watched)
        moved(batch)
    assert kept and batch.n_trained > 5
    assert all(x.ndim < 2 or x.shape[-1] < 512 or tuple(x.shape) == (64, 512) for x in kept)


def test_gradients_stay_with_their_network(moved: PolicyModel) -> None:
    batch = pack(episodes(forget=True), tokens_per_microbatch=1000)[0]

    def touched(term: str) -> set[str]:
        moved.zero_grad()
        getattr(moved(batch).soft, term).square().sum().backward()
        return {name.split(".layers")[0] for name, p in moved.named_parameters() if p.grad is not None and p.grad.any()}

    assert all(name.startswith("soft_critic.q.") for name in touched("q"))
    for term in ("expected_q", "kl"):
        assert touched(term) and all(name.startswith("lm.") for name in touched(term))
    assert not moved(batch).soft.target_q.requires_grad
    trained = {id(p) for p in [*moved.policy_parameters(), *moved.critic_parameters()]}
    assert trained == {id(p) for p in moved.parameters() if p.requires_grad}
    q = len(list(moved.lm.parameters())) if moved.critic == "soft_q" else 2
    assert len(trained) == len(list(moved.lm.parameters())) + q + 2


def test_only_what_is_wanted_is_computed(moved: PolicyModel) -> None:
    batch = pack(CASES["alone"](), tokens_per_microbatch=1000)[0]
    assert moved(batch, want_q=False, want_target=False).soft is None
    targets = moved(batch, want_q=False).soft
    assert targets.q is targets.expected_q is None and targets.target_q is not None
    losses = moved(batch, want_target=False).soft
    assert losses.target_q is None and losses.q is not None
    torch.testing.assert_close(losses.kl, targets.kl)


def test_the_target_follows_by_polyak(load: Load) -> None:
    policy = load()
    critic = policy.soft_critic
    assert critic is not None
    start = copy.deepcopy(critic.target.state_dict())
    move(critic.q, 1)
    goal = critic.q.state_dict()
    for _ in range(3):
        policy.move_target(0.75)
    for name, tensor in critic.target.state_dict().items():
        torch.testing.assert_close(tensor, 0.75**3 * start[name] + (1 - 0.75**3) * goal[name])
        assert not torch.equal(tensor, start[name]), name
    policy.move_target(0.0)
    assert all(torch.equal(tensor, goal[name]) for name, tensor in critic.target.state_dict().items())


def test_an_empty_batch_gives_zero_gradients_for_every_trained_parameter(moved: PolicyModel) -> None:
    moved.zero_grad()
    out = moved(Batch.empty())
    (out.soft.q.sum() + out.soft.expected_q.sum() + out.soft.kl.sum()).backward()
    assert out.soft.target_q.shape == (0,)
    for name, p in moved.named_parameters():
        assert not p.requires_grad or (p.grad is not None and not p.grad.any()), name


@pytest.mark.parametrize("name", ["lists", "multi_turn"])
def test_every_row_gives_every_trained_parameter_a_gradient(name: str, moved: PolicyModel) -> None:
    """Or ranks with lists and ranks without would reduce different gradients."""
    moved.zero_grad()
    soft = moved(pack(some_trajectories(name), tokens_per_microbatch=1000)[0]).soft
    (soft.q.sum() + soft.expected_q.sum() + soft.kl.sum()).backward()
    assert all(p.grad is not None for p in moved.parameters() if p.requires_grad)


def test_gradient_checkpointing_changes_nothing(load: Load) -> None:
    trajectories = episodes(forget=False)
    results = []
    for checkpointing in (False, True):
        policy = load(gradient_checkpointing=checkpointing)
        move(policy.lm, 0)
        move(policy.soft_critic.q, 1)
        move(policy.soft_critic.target, 2)
        results.append(packed(policy.train(), trajectories, tokens_per_microbatch=1000))
    assert_close(results[1], results[0])


# ---- the learner ----

ETPO = {"name": "etpo", "settings": {"beta": 0.1, "target_decay": 0.5}}
SOFT = {"critic": "soft_q", "lr": 1e-3, "critic_lr": 1e-3}
TIMED = {"learner/seconds", "learner/tokens_per_s"}


def state(learner: Learner) -> dict[str, torch.Tensor]:
    """Copies of all that training changes."""
    return {name: p.detach().clone() for name, p in learner.engine.policy.changing_parameters().items()}


def list_groups() -> Groups:
    """Four groups of two-turn episodes; all candidates of the first turn's list are taken, and the first earns 1."""
    made = []
    for g in range(4):
        tries = range(2 if g == 2 else 3)
        taken = [episode([g % 3, (g + 1) % 3], [which, 0], forget=True, group=f"g{g}") for which in tries]
        made.append([t.with_outcome(float(which == 0)) for which, t in enumerate(taken)])
    return made


@pytest.mark.parametrize("changes", [{}, {"critic": "soft_q_frozen"}, {"critic": "soft_q_frozen", "lora": {"rank": 2}}])
@pytest.mark.parametrize("which", ["free text", "lists"])
def test_a_step_changes_policy_critic_and_target(which: str, changes: dict[str, Any], job: Job, groups: Groups) -> None:
    learner = Learner(job(algorithm=ETPO, learner=SOFT | changes))
    before = state(learner)
    first, second, third = (learner.train_step(groups if which == "free text" else list_groups()) for _ in range(3))
    assert [first[f"learner/{name}"] for name in ("reference_kl", "q", "expected_q")] == pytest.approx([0, 0, 0], abs=1e-5)
    for metrics in (first, second, third):
        assert all(math.isfinite(x) for x in metrics.values())
        assert metrics.keys() >= {"learner/policy_loss", "learner/value_loss", "learner/critic_lr", "learner/entropy", "learner/grad_norm"}
    assert third["learner/reference_kl"] > 0 and third["learner/q"] != 0
    after = state(learner)
    prefixes = {"lm.", "soft_critic.q.", "soft_critic.target."}
    assert {p for p in prefixes for name in after if name.startswith(p)} == prefixes
    assert all(".stop." in name or not torch.equal(after[name], before[name]) for name in after)
    assert which == "free text" or all(after[f"soft_critic.{part}.stop.layers.0.bias"] != 0 for part in ("q", "target"))
    if "lora" not in changes:
        initial = {f"lm.{name}": p for name, p in learner.engine.policy.initial.named_parameters()}
        assert all(torch.equal(p, before[name]) for name, p in initial.items())
    assert all(name.startswith(("model.", "lm_head.")) for name, _ in learner.state_for_sync())


@pytest.mark.parametrize("which", ["free text", "lists"])
def test_an_update_does_not_depend_on_micro_batches(which: str, job: Job, groups: Groups) -> None:
    """One pass, two passes (a trajectory's contexts in several micro-batches) and unshared rows are one update."""
    chosen = groups if which == "free text" else list_groups()
    results = []
    for cut in ({}, {"tokens_per_microbatch": 20}, {"tokens_per_microbatch": 40, "share_prefixes": False}, {"logprob_chunk": 2}):
        learner = Learner(job(algorithm=ETPO, learner={**SOFT, "lr": 1e-4, "critic_lr": 1e-4, **cut}))
        # At the very start the policy's gradient is 0 but for rounding, which AdamW would make a step of.
        move(learner.engine.policy.lm, 0)
        start = state(learner)
        metrics = [learner.train_step(chosen) for _ in range(2)][-1]
        results.append((state(learner), metrics))
    for weights, metrics in results[1:]:
        for name, expected in results[0][0].items():  # whole tensors: AdamW also makes steps of single gradients near 0
            assert (weights[name] - expected).norm() <= 2e-3 * (expected - start[name]).norm(), name
        for key in ("learner/grad_norm", "learner/loss", "learner/value_loss", "learner/q", "learner/reference_kl"):
            assert metrics[key] == pytest.approx(results[0][1][key], abs=1e-5, rel=1e-3)
    assert results[1][1]["learner/micro_batches"] > 1


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_resume_is_bit_equal(stage: int, job: Job, groups: Groups, tmp_path: Path) -> None:
    config = job(algorithm=ETPO, learner={**SOFT, "zero_stage": stage, "updates_per_step": 2})
    learner = Learner(config)
    learner.train_step(groups)
    learner.save(tmp_path / "state")
    metrics = learner.train_step(groups)
    expected = state(learner)
    resumed = Learner(config)
    resumed.load(tmp_path / "state")
    got = resumed.train_step(groups)
    assert {k: v for k, v in got.items() if k not in TIMED} == {k: v for k, v in metrics.items() if k not in TIMED}
    resumed_state = state(resumed)
    assert resumed_state.keys() == expected.keys() and all(torch.equal(resumed_state[name], x) for name, x in expected.items())


@pytest.mark.parametrize("best", [0, 1])
def test_the_rewarded_candidates_win(best: int, job: Job) -> None:
    """Trained on every candidate alike, the policy goes to those that earn; one is the beginning of another."""
    learner = Learner(job(algorithm={"name": "etpo", "settings": {"beta": 0.1, "target_decay": 0.0}}, learner={**SOFT, "critic_lr": 3e-3}))
    chosen = [[episode([g % 3], [m], forget=True, group=str(g)).with_outcome(float(m == best)) for m in range(2)] for g in range(4)]

    def log_odds() -> torch.Tensor:
        """Of each list's winner against the other candidate."""
        return torch.stack([learner.logprobs([group[best]]).sum() - learner.logprobs([group[1 - best]]).sum() for group in chosen])

    assert log_odds().abs().max() < 1
    for _ in range(60):
        learner.train_step(chosen)
    assert log_odds().min() > 3
