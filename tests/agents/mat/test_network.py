"""The network: cached acting equals the parallel pass, causality, heads, and attention as PyTorch computes it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal

from reasoner_ray.agents.mat.layers import Attention, DecoderBlock
from reasoner_ray.agents.mat.network import MultiAgentTransformer
from reasoner_ray.agents.mat.settings import MatConfig
from tests.agents.mat.teams import LAYOUTS, network, situation, team

VARIANTS = ("mat", "mat_dec", "encoder_only", "decoder_only")


def orders(rows: int, n: int, shuffled: bool) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(rows)]) if shuffled else None


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_acting_step_by_step_and_the_parallel_pass_agree(variant: Any, layout: str, shuffled: bool) -> None:
    net = network(layout, variant=variant)
    observations, legal = situation(layout, rows=7)
    order = orders(7, 4, shuffled)
    acted = net.act(observations, legal, generator=torch.Generator().manual_seed(0), order=order)
    judged = net(observations, legal, acted.actions, order)
    torch.testing.assert_close(judged.logprobs, acted.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(judged.values, acted.values, atol=1e-5, rtol=0)
    parts = torch.from_numpy(LAYOUTS[layout].parts)
    assert (judged.logprobs[:, ~parts] == 0).all() and (judged.entropy[:, ~parts] == 0).all()
    assert (judged.logprobs[:, parts] != 0).any(), "the parts that there are carry log-probs"
    if LAYOUTS[layout].n_choices:
        chosen = acted.actions[..., :1].long()
        assert legal.gather(-1, chosen).all(), "nothing that the mask forbids is taken"
    if variant != "decoder_only":
        torch.testing.assert_close(net.values(observations, legal), acted.values, atol=1e-5, rtol=0)


def test_greedy_acting_takes_the_likeliest_choice_and_the_mean() -> None:
    net = network("both", variant="encoder_only")
    observations, legal = situation("both")
    out = net._at_once(observations, net._encode(observations))
    acted = net.act(observations, legal, greedy=True)
    assert torch.equal(acted.actions[..., 0].long(), out[..., :3].masked_fill(~legal, -1e10).argmax(-1))
    torch.testing.assert_close(acted.actions[..., 1:], out[..., 3:])


@pytest.mark.parametrize("variant", ["mat", "decoder_only"])
@pytest.mark.parametrize("layout", ["discrete", "semi_discrete"])
def test_an_agent_sees_the_actions_before_it_and_no_others(layout: str, variant: Any) -> None:
    net = network(layout, variant=variant)
    observations, legal = situation(layout, rows=1)
    legal[:] = True
    base = net.act(observations, legal, generator=torch.Generator().manual_seed(0)).actions
    before = net(observations, legal, base, None)
    for m in range(4):
        changed = base.clone()
        changed[:, m, 0] = (base[:, m, 0] + 1) % 3 if LAYOUTS[layout].choices[m] else base[:, m, 0]
        changed[:, m, 1:] += 0.5 if LAYOUTS[layout].dims[m] else 0.0
        after = net(observations, legal, changed, None)
        torch.testing.assert_close(after.entropy[:, : m + 1], before.entropy[:, : m + 1], atol=1e-6, rtol=0)
        torch.testing.assert_close(after.logprobs[:, :m], before.logprobs[:, :m], atol=1e-6, rtol=0)
        if m < 3:
            assert not torch.allclose(after.logprobs[:, m + 1], before.logprobs[:, m + 1], atol=1e-6), "the next agent does see it"


def test_in_another_order_other_actions_are_seen() -> None:
    net = network()
    observations, legal = situation(rows=1)
    legal[:] = True
    actions = torch.zeros(1, 4, 1)
    changed = actions.clone()
    changed[:, 0] = 1
    order = torch.tensor([[3, 2, 1, 0]])  # agent 0 acts last
    a, b = net(observations, legal, actions, order), net(observations, legal, changed, order)
    torch.testing.assert_close(a.logprobs[:, 1:], b.logprobs[:, 1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["mat_dec", "encoder_only"])
def test_agents_that_act_at_once_ignore_each_others_actions(variant: Any) -> None:
    net = network(variant=variant)
    observations, legal = situation(rows=2)
    a, b = net(observations, legal, torch.zeros(2, 4, 1), None), net(observations, legal, torch.ones(2, 4, 1), None)
    torch.testing.assert_close(a.entropy, b.entropy)


def test_actors_of_mat_dec_see_their_own_observation_alone_and_its_critic_sees_all() -> None:
    net = network(variant="mat_dec")
    observations, legal = situation(rows=1)
    other = observations.clone()
    other[:, 3, 0] += 1.0  # one number alone: the layer norm takes away what all have in common
    a, b = net(observations, legal, torch.zeros(1, 4, 1), None), net(other, legal, torch.zeros(1, 4, 1), None)
    torch.testing.assert_close(a.logprobs[:, :3], b.logprobs[:, :3])
    assert not torch.allclose(a.values[:, :3], b.values[:, :3], atol=1e-4)


def as_torch(ours: Attention) -> nn.MultiheadAttention:
    width = ours.query.in_features
    theirs = nn.MultiheadAttention(width, ours.heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    return theirs


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_torchs_own(heads: int) -> None:
    torch.manual_seed(0)
    ours = Attention(8, heads)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs, query, memory = as_torch(ours), torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(query, memory, causal=False), theirs(query, memory, memory)[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours(query, memory, causal=True), theirs(query, memory, memory, attn_mask=future)[0], atol=1e-6, rtol=1e-5)


def test_a_decoder_block_by_hand() -> None:
    """One agent: softmax over one place is 1, so attention is ``out(value(x))``; the residual of the second one is the observation."""
    torch.manual_seed(0)
    block = DecoderBlock(4, 1, 1)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x, rep = torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    first, second, third = block.norms
    y = first(x + block.attention.out(block.attention.value(x)))
    z = second(rep + block.cross.out(block.cross.value(y)))
    torch.testing.assert_close(block(x, rep), third(z + block.mlp(z)))


def test_heads_are_torchs_distributions() -> None:
    net = network("both")
    head = net.head
    out, legal = torch.randn(2, 4, 5), torch.tensor([True, False, True]).expand(2, 4, 3)
    actions = torch.cat([torch.full((2, 4, 1), 2.0), torch.randn(2, 4, 2)], -1)
    assert head.log_std is not None
    choice, normal = Categorical(logits=out[..., [0, 2]]), Normal(out[..., 3:], 0.5 * head.log_std.sigmoid())
    expected = torch.cat([choice.log_prob(torch.ones(2, 4))[..., None], normal.log_prob(actions[..., 1:])], -1)
    torch.testing.assert_close(head.logprobs(out, legal, actions, head.parts), expected)
    entropy = torch.cat([choice.entropy()[..., None], normal.entropy()], -1)
    torch.testing.assert_close(head.entropy(out, legal, head.parts), entropy)


def test_tokens_by_hand() -> None:
    head = network("both").head
    told = head.tokens(torch.tensor([[[1.0, 0.5, -0.25]]]), torch.ones(1, 3))
    assert told.tolist() == [[[0.0, 0.0, 1.0, 0.0, 0.5, -0.25]]]
    assert head.start(1, told).tolist() == [[[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]]
    continuous = network("continuous").head
    assert continuous.start(1, told).tolist() == [[[0.0, 0.0]]], "without choices the start is zeros"
    mixed = network("semi_discrete").head
    assert mixed.tokens(torch.tensor([[[0.0, 0.5]]]), mixed.parts[3]).tolist() == [[[0, 0, 0, 0, 0.5]]], "no choice, no one-hot"


def test_sampling_follows_the_distribution() -> None:
    head = network("both").head
    out = torch.tensor([0.0, 5.0, math.log(3.0), 0.7, -0.2]).expand(20_000, 1, 5)
    legal = torch.tensor([True, False, True]).expand(20_000, 1, 3)
    actions = head.sample(out, legal, greedy=False, generator=torch.Generator().manual_seed(0))
    assert (actions[..., 0] == 2).float().mean() == pytest.approx(0.75, abs=0.01)
    assert actions[..., 1:].mean((0, 1)).tolist() == pytest.approx([0.7, -0.2], abs=0.01)
    assert head.log_std is not None
    assert actions[..., 1:].std((0, 1)).tolist() == pytest.approx((0.5 * head.log_std.sigmoid()).tolist(), abs=0.01)


def test_initialisation_and_size_follow_the_settings() -> None:
    net = MultiAgentTransformer(team("continuous"), MatConfig(width=16, expansion=3, blocks=2, std_init=1.0))
    assert net.head.log_std is not None and float(0.5 * net.head.log_std.sigmoid()[0]) == pytest.approx(0.3655, abs=1e-4)
    block = net.encoder[1]
    assert block.mlp[0].weight.shape == (48, 16) and len(net.decoder.blocks) == 2
    gram = block.mlp[0].weight.T @ block.mlp[0].weight
    torch.testing.assert_close(gram, 2 * torch.eye(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(block.attention.query.weight.norm() ** 2, torch.tensor(16 * 0.01**2), atol=1e-6, rtol=0)
    assert net.decoder.embedding[0].bias is not None
    assert MultiAgentTransformer(team("discrete"), MatConfig()).decoder.embedding[0].bias is None
