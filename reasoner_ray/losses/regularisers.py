"""The KL penalty towards a reference policy as a loss term."""

from __future__ import annotations

import torch

from reasoner_ray.credit.kl import KlKind, kl_estimate


def kl_penalty(logprobs: torch.Tensor, old_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: KlKind) -> torch.Tensor:
    """Per-token term [k] whose mean over samples of pi_old has the gradient of KL(pi || ref), for every ``kind``.

    A bare estimator in a loss does not: the mean gradient of k1 is 0, that of k3 belongs to KL(ref || pi), because
    the samples' own distribution is not differentiated. So k1 and k3 carry the ratio pi/pi_old with its gradient
    (DeepSeek-V3.2, eq. 7), and k2, whose own gradient is right for samples of pi, carries it detached.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    return (ratio.detach() if kind == "k2" else ratio) * kl_estimate(logprobs, ref_logprobs, kind)
