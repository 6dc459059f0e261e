"""The Decision Transformer (Chen et al. 2021, arXiv 2106.01345) on transformers' GPT-2; cloning is the same without returns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2Model

from reasoner_ray.agents.sequence.heads import Head
from reasoner_ray.agents.sequence.settings import SequenceConfig
from reasoner_ray.agents.sequence.spaces import Interface
from reasoner_ray.agents.sequence.windows import NO_ACTION, Units, Windows
from reasoner_ray.agents.weights import ABOUT, WEIGHTS, check_settings, read_weights
from reasoner_ray.errors import ModelError

SAVED = ("variant", "context", "width", "blocks", "heads", "activation", "time_embedding", "return_scale")
"""Settings of ``sequence`` that say what a network's weights mean; the others say how it learns, which may change."""


class DecisionTransformer(nn.Module):
    """Reads (return to go, state, action) of up to K steps as 3K tokens, and says each step's action from its state token.

    Every kind of token has a linear map of its own; the tokens of a step share a learnt vector for the time step, which is the only
    position there is; LayerNorm; GPT-2 blocks, causal, padded steps unseen. ``variant: bc`` has no return tokens.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, interface: Interface, settings: SequenceConfig, horizon: int) -> None:
        """``horizon`` is the number of time steps that there are vectors for."""
        super().__init__()
        self.interface, self.settings, self.horizon = interface, settings, horizon
        width = settings.width
        self.tokens = 3 if settings.variant == "dt" else 2
        if self.tokens == 3:
            self.embed_return = nn.Linear(1, width)
        self.embed_state = nn.Linear(interface.state, width)
        self.embed_action = nn.Linear(interface.action, width)
        self.embed_timestep = nn.Embedding(horizon, width) if settings.time_embedding else None
        self.embed_ln = nn.LayerNorm(width)
        self.trunk = GPT2Model(_trunk_config(settings, self.tokens * settings.context))
        # GPT-2's own embeddings of words and positions are none of this network's: they add nothing and learn nothing.
        nn.init.zeros_(self.trunk.wpe.weight)
        self.trunk.wpe.requires_grad_(False)
        self.trunk.wte.requires_grad_(False)
        self.head = Head(width, interface, stochastic=settings.online is not None)
        self.register_buffer("mean", torch.zeros(interface.state))
        self.register_buffer("std", torch.ones(interface.state))

    @property
    def units(self) -> Units:
        """What its inputs are measured in."""
        no_action = 0.0 if self.interface.choices else NO_ACTION
        mean, std = self.mean.cpu().numpy(), self.std.cpu().numpy()
        return Units(mean=mean, std=std, return_scale=self.settings.return_scale, no_action=no_action)

    def measure_in(self, mean: np.ndarray, std: np.ndarray) -> None:
        """States are standardised by these, float32 [state] each."""
        self.mean.copy_(torch.from_numpy(mean))
        self.std.copy_(torch.from_numpy(std))

    def forward(self, windows: Windows) -> torch.Tensor:
        """What the head says of every step, [B, K, outputs]."""
        tokens = [self.embed_state(windows.states), self.embed_action(windows.actions)]
        if self.tokens == 3:
            tokens.insert(0, self.embed_return(windows.returns[..., None]))
        x = torch.stack(tokens, 2)  # [B, K, tokens, width]
        if self.embed_timestep is not None:
            x = x + self.embed_timestep(windows.times)[:, :, None]
        seen = windows.mask[:, :, None].expand(-1, -1, self.tokens).flatten(1)
        hidden = self.trunk(inputs_embeds=self.embed_ln(x).flatten(1, 2), attention_mask=seen.long(), use_cache=False).last_hidden_state
        said: torch.Tensor = self.head(hidden[:, self.tokens - 2 :: self.tokens])
        return said

    @torch.inference_mode()
    def act(self, windows: Windows, *, greedy: bool, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encoded actions [B, action] of the last step of each window, whose own action is not known yet."""
        return self.head.act(self(windows)[:, -1], greedy=greedy, generator=generator)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Write what ``load_network`` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in self.state_dict().items()}, folder / WEIGHTS)
        about = {"interface": self.interface.to_dict(), "sequence": self.settings.model_dump(mode="json"), "horizon": self.horizon}
        (folder / ABOUT).write_text(json.dumps(about, indent=1))


def load_network(folder: Path) -> DecisionTransformer:
    """A network that ``save`` wrote, as it was. Raises ``ModelError``."""
    with _reading(folder):
        interface, given, horizon = _about(folder)
        network = DecisionTransformer(interface, SequenceConfig.model_validate(given), horizon)
    read_weights(network, folder, "sequence")
    return network.eval()


def load_weights(network: DecisionTransformer, folder: Path) -> None:
    """Let ``network`` go on from what ``save`` wrote. Raises ``ModelError`` where that is of other settings or another environment."""
    with _reading(folder):
        interface, given, horizon = _about(folder)
    if interface != network.interface:
        raise ModelError(
            f"{folder} acts in another environment than {network.settings.world.id}: {interface} there, {network.interface} here; go on "
            "from a network of this environment, or begin with model.path=scratch"
        )
    check_settings(folder, "sequence", given, network.settings.model_dump(mode="json"), SAVED)
    if network.embed_timestep is not None and horizon != network.horizon:
        raise ModelError(
            f"{folder} knows {horizon} time steps, an episode here has up to {network.horizon}; set sequence.world.max_steps={horizon}, or "
            "begin with model.path=scratch"
        )
    read_weights(network, folder, "sequence")


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder} holds no network of kind sequence ({type(error).__name__}: {error}); give the folder model/ of a run"
        ) from error


def _about(folder: Path) -> tuple[Interface, dict[str, Any], int]:
    """What ``save`` wrote beside the weights: the interface, the settings that it names, the horizon."""
    tree: dict[str, Any] = json.loads((folder / ABOUT).read_text())
    return Interface.from_dict(tree["interface"]), dict(tree["sequence"]), int(tree["horizon"])


def _trunk_config(settings: SequenceConfig, length: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=1,
        n_positions=length,
        n_embd=settings.width,
        n_layer=settings.blocks,
        n_head=settings.heads,
        activation_function=settings.activation,
        initializer_range=settings.init_std,
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
