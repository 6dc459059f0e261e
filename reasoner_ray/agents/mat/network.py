"""The Multi-Agent Transformer: one network that acts for a whole team, agent after agent, and is trained in one parallel pass.

Observations go through an encoder without positions (an agent's identity must be in its observation), whose outputs carry the
values; a causal decoder says each agent's action from its observation and the actions before it (Wen et al. 2022,
arXiv 2205.14953, section 4; the multi-agent advantage decomposition is their theorem 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from reasoner_ray.agents.mat.heads import ActionHead
from reasoner_ray.agents.mat.layers import Decoder, EncoderBlock, linear, output_layers
from reasoner_ray.envs.multi_agent.spec import TeamSpec

if TYPE_CHECKING:
    from reasoner_ray.agents.mat.settings import MatConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Acted:
    """A joint action of each of B environments, agents in the environment's order."""

    actions: torch.Tensor  # float32 [B, n, parts]; the number of the choice first
    logprobs: torch.Tensor  # float32 [B, n, parts]
    values: torch.Tensor  # float32 [B, n], in units of normalised returns


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the network says of joint actions that were taken."""

    logprobs: torch.Tensor  # float32 [B, n, parts]
    entropy: torch.Tensor  # float32 [B, n, parts]; nats
    values: torch.Tensor  # float32 [B, n]


class MultiAgentTransformer(nn.Module):
    """MAT and its variants (``mat.variant``). Every method takes all agents of B environments at once.

    ``order`` (int64 [B, n]) says which agent acts m-th in each environment; None is the environment's own order. Values are in
    units of normalised returns. Observations are float32 [B, n, observation], ``legal`` bool [B, n, choices]. No weight depends on
    the number of agents, so a network serves every team that observes and does as many numbers.
    """

    def __init__(self, team: TeamSpec, config: MatConfig) -> None:
        super().__init__()
        width = config.width
        self.variant = config.variant
        self.autoregressive = config.variant in ("mat", "decoder_only")
        self.head = ActionHead(team.actions, config.std_init)
        self.embedding = nn.Sequential(
            nn.LayerNorm(team.observation), linear(team.observation, width, activated=True), nn.GELU(), nn.LayerNorm(width)
        )
        blocks = 0 if config.variant == "decoder_only" else config.blocks
        self.encoder = nn.Sequential(*(EncoderBlock(width, config.heads, config.expansion) for _ in range(blocks)))
        self.value = output_layers(width, 1)
        if self.autoregressive:
            self.decoder = Decoder(
                *(self.head.token, width, config.heads, config.expansion, config.blocks, self.head.outputs),
                token_bias=not self.head.has_choice,
            )
        elif config.variant == "encoder_only":
            self.actor: nn.Module = output_layers(width, self.head.outputs)
        else:
            self.actor = nn.Sequential(
                *(nn.LayerNorm(team.observation), linear(team.observation, width, activated=True), nn.GELU(), nn.LayerNorm(width)),
                *(linear(width, width, activated=True), nn.GELU(), nn.LayerNorm(width), linear(width, self.head.outputs)),
            )

    def forward(
        self,
        observations: torch.Tensor,
        legal: torch.Tensor,
        actions: torch.Tensor,
        order: torch.Tensor | None,
        own_parts: torch.Tensor | None = None,
    ) -> Judged:
        """Judge ``actions`` [B, n, parts] in one parallel pass: the same log-probs and values as ``act`` gave.

        ``own_parts`` (float [n, parts]) says which parts the agents' actions have, where they are of another team than the network
        was made for.
        """
        rep = self._encode(observations)
        parts = self.head.parts if own_parts is None else own_parts
        if not self.autoregressive:
            out = self._at_once(observations, rep)
            return self._judge(out, legal, actions, parts, self.value(rep).squeeze(-1))
        parts = _in_order(parts, order)
        rep, legal, actions = (_sorted(x, order) for x in (rep, legal, actions))
        told = self.head.tokens(actions, parts)
        shifted = torch.cat([self.head.start(len(told), told), told[:, :-1]], 1)
        out, hidden = self.decoder(shifted, rep)
        values = self.value(hidden if self.variant == "decoder_only" else rep).squeeze(-1)
        judged = self._judge(out, legal, actions, parts, values)
        return Judged(
            logprobs=_unsorted(judged.logprobs, order),
            entropy=_unsorted(judged.entropy, order),
            values=_unsorted(judged.values, order),
        )

    @torch.no_grad()
    def act(
        self,
        observations: torch.Tensor,
        legal: torch.Tensor,
        *,
        greedy: bool = False,
        generator: torch.Generator | None = None,
        order: torch.Tensor | None = None,
    ) -> Acted:
        """Act for every agent of every environment: one decoder step an agent, with the keys and values of the earlier ones kept."""
        rep, parts = self._encode(observations), _in_order(self.head.parts, order)
        if not self.autoregressive:
            out = self._at_once(observations, rep)
            actions = self.head.sample(out, legal, greedy=greedy, generator=generator) * self.head.parts
            logprobs = self.head.logprobs(out, legal, actions, self.head.parts)
            return Acted(actions=actions, logprobs=logprobs, values=self.value(rep).squeeze(-1))
        rep, legal = _sorted(rep, order), _sorted(legal, order)
        rows, n = rep.shape[:2]
        cache, token = self.decoder.new_cache(rows, n, rep), self.head.start(rows, rep)
        taken, outs, hidden = [], [], []
        for m in range(n):
            here, own = slice(m, m + 1), parts[..., m : m + 1, :]
            out, state = self.decoder.step(token, rep[:, here], cache, m)
            action = self.head.sample(out, legal[:, here], greedy=greedy, generator=generator) * own
            token = self.head.tokens(action, own)
            taken.append(action)
            outs.append(out)
            hidden.append(state)
        actions = torch.cat(taken, 1)
        logprobs = self.head.logprobs(torch.cat(outs, 1), legal, actions, parts)
        values = self.value(torch.cat(hidden, 1) if self.variant == "decoder_only" else rep).squeeze(-1)
        return Acted(actions=_unsorted(actions, order), logprobs=_unsorted(logprobs, order), values=_unsorted(values, order))

    @torch.no_grad()
    def values(self, observations: torch.Tensor, legal: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
        """Values [B, n] alone. Those of ``decoder_only`` depend on earlier actions: it takes the likeliest ones."""
        if self.variant == "decoder_only":
            return self.act(observations, legal, greedy=True, order=order).values
        return self.value(self._encode(observations)).squeeze(-1)

    def _encode(self, observations: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embedding(observations))

    def _at_once(self, observations: torch.Tensor, rep: torch.Tensor) -> torch.Tensor:
        """Outputs [B, n, choices + dims] of the variants whose agents do not wait for each other."""
        return self.actor(rep if self.variant == "encoder_only" else observations)

    def _judge(self, out: torch.Tensor, legal: torch.Tensor, actions: torch.Tensor, parts: torch.Tensor, values: torch.Tensor) -> Judged:
        logprobs = self.head.logprobs(out, legal, actions, parts)
        return Judged(logprobs=logprobs, entropy=self.head.entropy(out, legal, parts), values=values)


def _in_order(parts: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Which parts the actions have, float [n, parts], or [B, n, parts] in ``order``."""
    return parts if order is None else parts[order]


def _sorted(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """``x`` [B, n, ...] with its agents in the order in which they act."""
    return x if order is None else x.take_along_dim(order.view(*order.shape, *(1,) * (x.dim() - 2)), 1)


def _unsorted(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """The inverse of ``_sorted``."""
    return x if order is None else _sorted(x, order.argsort(1))
