"""The soft critic of ETPO: Q of every next token, and the expectations that its targets and losses are made of.

ETPO (Wen et al. 2024, arXiv 2402.06700) takes three token networks beside the policy: Q, a slowly moving copy of it
that gives the targets, and the reference rho, the policy's initial model. In the state x that predicts a token,

    E_pi[Q(x, .)] = sum_w pi(w|x) Q(x, w)        KL(x) = sum_w pi(w|x) (log pi(w|x) - log rho(w|x))

run over what the token was drawn from: the whole vocabulary for free text, and for an action that was chosen from a
list the edges of the candidate tree that leave x (see ``choices.py``), with pi and rho both normalised over the list.

The network is a copy of the language model and ``Q(x, w) = logit_Q(x, w) - logit_rho(x, w)``, so that Q starts at
exactly 0. The paper takes the copy's logits alone: their spread of tens of nats, divided by beta = 0.01, would make the
first update's goal ``rho exp(Q / beta)`` a nearly deterministic policy before a single reward was seen.

That network learns a value by moving all weights of a language model, which moves the values of all other states and
tokens too. The frozen one (``soft_q_frozen``) is linear in the initial model's hidden states h(x), with a part that all tokens
share and learn fast, and one of their own: ``Q(x, w) = (v + u_w / 10) . h(x)``. It takes no forward pass beyond the KL's.

Where one candidate of a list begins another, the same token may end the action or go on with it, which are two edges
and one token. There the end's Q has a term of its own: a linear function, at first 0, of the state after the token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from reasoner_ray.choices import ChoiceForest, edge_logprobs, expectation
from reasoner_ray.learner.value import ValueHead
from reasoner_ray.packing import Batch

Run = Callable[[PreTrainedModel], torch.Tensor]

_OWN_SHARE = 0.1  # Adam moves every weight alike: what tells tokens apart is small beside what a state is worth, and must be as calm


class SoftTerms(NamedTuple):
    """What the soft critic says of a batch's K trainable tokens, float32 each; None where not wanted."""

    kl: torch.Tensor  # [K]; KL(pi || rho) of the distribution that the token was drawn from, nats; gradient to pi alone
    q: torch.Tensor | None  # [K]; Q(x, the token); gradient to Q alone
    expected_q: torch.Tensor | None  # [K]; E_pi[Q(x, .)]; gradient to pi alone
    target_q: torch.Tensor | None  # [K]; E_pi[Q(x, .)] of the target network; no gradient


class Logits(NamedTuple):
    """The logits of a language model on a row, not computed yet.

    They come in float32 whatever the type of the passes: a bfloat16 logit of 20 is a multiple of 1/8, and a Q that is
    the difference of two such logits could not say anything finer.
    """

    hidden: torch.Tensor  # [N, d]
    weight: torch.Tensor  # float32 [V, d]
    bias: torch.Tensor | None  # float32 [V]

    def of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """All logits [r, V] at the packed indices ``rows`` (int64 [r])."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            return F.linear(self.hidden.index_select(0, rows).float(), self.weight, self.bias)

    def of_pairs(self, batch: Batch) -> torch.Tensor:
        """The logits [P] of the batch's (predictor, target) pairs."""
        hidden = self.hidden.index_select(0, batch.predictors).float()
        logits = (hidden * self.weight.index_select(0, batch.targets)).sum(-1)
        return logits if self.bias is None else logits + self.bias.index_select(0, batch.targets)

    def detach(self) -> Logits:
        """The same logits without a gradient."""
        return Logits(self.hidden.detach(), self.weight.detach(), None if self.bias is None else self.bias.detach())


class TokenModel(NamedTuple):
    """A model that the critic looks at: the policy or the reference."""

    logits: Logits
    logprobs: torch.Tensor | None  # float32 [P]; of the batch's pairs, nats; None where the batch has no lists


class TokenQ(nn.Module):
    """A Q network: logits that are read as values, of a language model or linear in the reference's, and what ending an action adds."""

    def __init__(self, lm: PreTrainedModel, *, frozen: bool) -> None:
        """Begins as ``lm``; ``frozen`` leaves its trunk to the reference and learns what to add to its LM head."""
        super().__init__()
        vocabulary, width = lm.get_output_embeddings().weight.shape
        self.lm = None if frozen else copy.deepcopy(lm)
        self.shared = nn.Parameter(torch.zeros(width)) if frozen else None
        self.own = nn.Parameter(torch.zeros(vocabulary, width)) if frozen else None
        self.stop = ValueHead(width, ())

    def logits(self, run: Run, reference: Logits) -> Logits:
        """Its logits on the row that ``run`` runs models on, and ``reference`` is of."""
        if self.own is not None and self.shared is not None:
            return reference._replace(weight=reference.weight.detach() + self.shared + _OWN_SHARE * self.own)
        assert self.lm is not None
        head: Any = self.lm.get_output_embeddings()
        return Logits(run(self.lm), head.weight, head.bias)

    def values(self, logits: Logits, base: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Q of the batch's pairs and then of its edges, [P + E]; ``base`` is the reference's logits [P] of the pairs."""
        pairs = logits.of_pairs(batch) - base
        of_edge = ends = after = batch.source[:0]
        if batch.choices is not None and batch.choice_pairs is not None:
            of_edge = batch.choice_pairs[batch.choices.edge_token]
            ends, after = _open_ends(batch.choices, batch.targets[of_edge])
        # Used without an open end, too: ranks that reduce gradients together must all have one of every parameter.
        stops = self.stop(logits.hidden.index_select(0, batch.predictors[of_edge[after]]))
        return torch.cat([pairs, pairs[of_edge].index_add(0, ends, stops)])


class SoftCritic(nn.Module):
    """A Q network, begun as a copy of ``lm``, and its target.

    The target is float32 as the network is: with a decay of 0.995 bfloat16 would round most of its moves away.
    """

    def __init__(self, lm: PreTrainedModel, temperature: float, chunk: int, *, frozen: bool = False) -> None:
        """``temperature`` is that of the sampling, hence of pi and rho; ``chunk`` the positions whose logits exist at once.

        ``frozen`` leaves the initial model's trunk as it is and learns a head on it; see the module's text.
        """
        super().__init__()
        self.q = TokenQ(lm, frozen=frozen)
        self.target = copy.deepcopy(self.q).requires_grad_(False).eval()
        self.temperature = temperature
        self.chunk = chunk

    def forward(self, batch: Batch, run: Run, policy: TokenModel, reference: TokenModel, *, want_q: bool, want_target: bool) -> SoftTerms:
        """The terms of ``batch``; ``run`` gives a model's last hidden states [N, d] on its row."""
        q = self.q.logits(run, reference.logits) if want_q else None
        with torch.no_grad():
            target = self.target.logits(run, reference.logits) if want_target else None
        base, n_pairs = reference.logits.of_pairs(batch), len(batch.targets)
        q_values = None if q is None else self.q.values(q, base, batch)
        target_values = None if target is None else self.target.values(target, base, batch)

        free = batch.source < n_pairs
        rows, place = torch.unique(batch.states[free], return_inverse=True)
        index = batch.source - n_pairs + len(rows)  # into the means: first of the rows, then of the edges
        index[free] = place
        means = [self._over_vocabulary(rows, policy.logits, reference.logits, None if q is None else q.detach(), target)]
        if batch.choices is not None and batch.choice_pairs is not None:
            log_pi, log_rho = (_edge_logprobs(model, batch.choices, batch.choice_pairs) for model in (policy, reference))
            q_edges = None if q_values is None else q_values.detach()[n_pairs:]
            target_edges = None if target_values is None else target_values[n_pairs:]
            means.append(_over_lists(batch.choices, log_pi, log_rho, q_edges, target_edges))
        kl, expected_q, target_q = _join(means)
        return SoftTerms(
            kl=kl[index],
            q=None if q_values is None else q_values[batch.source],
            expected_q=None if expected_q is None else expected_q[index],
            target_q=None if target_q is None else target_q[index],
        )

    @torch.no_grad()
    def move_target(self, decay: float) -> None:
        """``target = decay * target + (1 - decay) * q`` (Polyak averaging)."""
        for slow, fast in zip(self.target.parameters(), self.q.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)

    def _over_vocabulary(self, rows: torch.Tensor, policy: Logits, reference: Logits, q: Logits | None, target: Logits | None) -> _Means:
        """KL and expectations in the states at the packed indices ``rows`` (int64 [r]), chunk by chunk; [r] each."""

        def of_chunk(part: torch.Tensor) -> _Means:
            base = reference.of_rows(part)
            log_rho = F.log_softmax(base / self.temperature, dim=-1)
            log_pi = F.log_softmax(policy.of_rows(part) / self.temperature, dim=-1)
            pi = log_pi.exp()
            kl = torch.linalg.vecdot(pi, log_pi - log_rho)
            expected_q = None if q is None else torch.linalg.vecdot(pi, q.of_rows(part) - base)
            target_q = None if target is None else torch.linalg.vecdot(pi.detach(), target.of_rows(part) - base)
            return kl, expected_q, target_q

        # Its [chunk, V] tensors are computed again for the backward pass, instead of all being kept until then.
        return _join([checkpoint(of_chunk, part, use_reentrant=False, preserve_rng_state=False) for part in rows.split(self.chunk)])


_Means = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # KL, E_pi[Q], E_pi[Q of the target]


def _over_lists(
    forest: ChoiceForest, log_pi: torch.Tensor, log_rho: torch.Tensor, q: torch.Tensor | None, target: torch.Tensor | None
) -> _Means:
    """KL and expectations in the states that edges leave; everything [E]."""
    kl = expectation(log_pi - log_rho, log_pi, forest)
    expected_q = None if q is None else expectation(q, log_pi, forest)
    return kl, expected_q, None if target is None else expectation(target, log_pi.detach(), forest)


def _edge_logprobs(model: TokenModel, forest: ChoiceForest, choice_pairs: torch.Tensor) -> torch.Tensor:
    assert model.logprobs is not None
    return edge_logprobs(model.logprobs[choice_pairs], forest)


def _open_ends(forest: ChoiceForest, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges that end a candidate with a token that also leads on; for each, an edge that follows the one that leads on.

    ``tokens`` (int64 [E]) are the edges' token ids; both results are int64 [s].
    """
    number = torch.arange(forest.n_edges, device=tokens.device)
    inner = forest.parent >= 0
    child = number.new_full((forest.n_edges,), -1).scatter_reduce(0, forest.parent[inner], number[inner], "amax")
    _, step = torch.unique(torch.stack([forest.node, tokens]), dim=1, return_inverse=True)
    leads_on = number.new_full((forest.n_edges,), -1).scatter_reduce(0, step, child, "amax")[step]
    ends = (child < 0) & (leads_on >= 0)
    return number[ends], leads_on[ends]


def _join(parts: Sequence[_Means]) -> _Means:
    kl, expected_q, target_q = zip(*parts, strict=True)
    return torch.cat(kl), None if expected_q[0] is None else torch.cat(expected_q), None if target_q[0] is None else torch.cat(target_q)
