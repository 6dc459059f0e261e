"""The policy as the learner sees it: packed rows in; log-probs, entropies and values of single tokens out.

A Hugging Face causal LM of any architecture whose attention goes through transformers' AttentionInterface. Only the
trunk of that model runs; the LM head is applied in chunks, to the positions that predict a trainable token alone.
Parameters are float32; where the compute type is bfloat16 the passes run under autocast.
"""

from __future__ import annotations

import contextlib
import copy
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from reasoner_ray.errors import EnvironmentProblem, ModelError
from reasoner_ray.learner.attention import TREE_ATTENTION, Backend, TreeMask
from reasoner_ray.learner.heads import HeadKind, has_head, load_head
from reasoner_ray.learner.logprobs import chunked_logprobs
from reasoner_ray.learner.resumed import Resumed
from reasoner_ray.learner.soft_critic import Logits, SoftCritic, SoftTerms, TokenModel
from reasoner_ray.learner.value import ValueHead
from reasoner_ray.models import resolve_dtype, resolve_model
from reasoner_ray.packing import Batch

if TYPE_CHECKING:  # the model side needs torch and transformers alone
    from reasoner_ray.config import ModelConfig
    from reasoner_ray.learner.settings import CriticKind, LearnerConfig, LoraConfig

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]

_FLEX_MULTIPLE = 128  # FlexAttention's block; rows are padded to it so that few lengths are compiled


class Outputs(NamedTuple):
    """Results of one forward pass, float32, in the order of the batch's K trainable tokens."""

    logprobs: torch.Tensor  # [K]; log pi(target), nats, at the sampling temperature
    entropy: torch.Tensor | None  # [K]; nats; None where not wanted
    values: torch.Tensor | None  # [K]; V(state that predicts the token); None without a critic or where not wanted
    bootstrap_values: torch.Tensor | None  # [b]; V(state after the last token), see Batch.bootstrap
    soft: SoftTerms | None = None  # of the soft critic; None without one or where not wanted


class LogprobHead(nn.Module):
    """The LM head applied in chunks. Holds the head's own parameters, so that an engine that gathers sharded
    parameters module by module (ZeRO-3) finds them here."""

    def __init__(self, linear: nn.Linear, temperature: float, chunk: int) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.temperature = temperature
        self.chunk = chunk

    def forward(self, hidden: torch.Tensor, batch: Batch, with_entropy: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs and entropies [P] of the batch's pairs from hidden states [N, d]."""
        logprobs, entropy = chunked_logprobs(
            hidden,
            self.weight,
            batch.predictors,
            batch.targets,
            temperature=self.temperature,
            chunk=self.chunk,
            bias=self.bias,
            with_entropy=with_entropy,
        )
        return logprobs, entropy if with_entropy else None


class PolicyModel(nn.Module):
    """Policy, critic and reference over packed rows; made by ``load_policy``.

    The critic is ``none``; ``shared``: a head on the policy's hidden states, detached, so that its loss never moves
    the trunk; ``frozen``: a head on the initial model's hidden states (POAD); ``separate``: a trunk and a head of its
    own; ``soft_q``: a Q network and its target (ETPO); ``soft_q_frozen``: the same as LM heads on the initial model's
    hidden states; ``joint``: a head on the policy's hidden states whose loss trains the trunk, and nothing but it (process
    reward and value models). The initial model is the policy with its adapters off under LoRA, and one frozen copy
    otherwise, which the frozen or soft critic and the reference share.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        critic: CriticKind = "none",
        critic_hidden: Sequence[int] = (1024, 512),
        lora: LoraConfig | None = None,
        needs_reference: bool = False,
        temperature: float = 1.0,
        chunk: int = 1024,
        gradient_checkpointing: bool = False,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.critic = critic
        self.backend: Backend | None = None  # None: FlexAttention on CUDA, SDPA elsewhere
        self.compute_dtype = compute_dtype
        self.has_adapters = lora is not None
        soft, on_initial = critic.startswith("soft_q"), critic in ("frozen", "soft_q_frozen")
        wants_initial = needs_reference or soft or on_initial
        # A soft critic subtracts the initial model's logits from its own, so it must have rounded the same weights.
        initial_dtype = torch.float32 if critic == "soft_q" else compute_dtype
        self.initial = copy.deepcopy(lm).to(initial_dtype).requires_grad_(False).eval() if wants_initial and not self.has_adapters else None
        self.critic_trunk = copy.deepcopy(lm.base_model) if critic == "separate" else None
        self.value_head = None if critic == "none" or soft else ValueHead(_hidden_size(lm), critic_hidden)
        self.soft_critic = SoftCritic(lm, temperature, chunk, frozen=on_initial) if soft else None
        if lora is not None:
            _add_adapters(lm, lora)
        self.lm = lm
        self.head = LogprobHead(lm.get_output_embeddings(), temperature, chunk)
        if critic == "joint" and self.head.weight is not lm.get_input_embeddings().weight:
            self.head.requires_grad_(False)  # no loss reads it, and ranks must agree on what has a gradient
        self.initial_head = None if self.initial is None else LogprobHead(self.initial.get_output_embeddings(), temperature, chunk)
        if gradient_checkpointing:
            q = None if self.soft_critic is None else self.soft_critic.q.lm
            for trunk in filter(None, (self.lm, self.critic_trunk, q)):
                trunk.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(
        self, batch: Batch, *, want_values: bool = True, want_entropy: bool = True, want_q: bool = True, want_target: bool = True
    ) -> Outputs:
        """Log-probs, entropies and values of a batch's trainable tokens.

        Of a soft critic, ``want_q`` asks for Q and its expectation, ``want_target`` for that of the target network.
        """
        want_values = want_values and self.value_head is not None
        batch, tree = self._prepare(batch)
        with self._autocast():
            hidden = _run(self.lm, batch, tree)
            pairs, pair_entropy = self.head(hidden, batch, want_entropy)
            soft = self._soft_terms(batch, tree, hidden, pairs, want_q, want_target) if want_q or want_target else None
            states = self._critic_states(batch, tree, hidden) if want_values else None
        values = bootstrap = None
        if states is not None and self.value_head is not None:
            wanted, place = torch.unique(torch.cat([batch.states, batch.bootstrap]), return_inverse=True)
            values, bootstrap = self.value_head(states[wanted])[place].split([batch.n_trained, len(batch.bootstrap)])
        return Outputs(*batch.of_stream(pairs, pair_entropy), values, bootstrap, soft)

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probs [K] of the batch's targets under the initial policy.

        Raises ``ValueError`` where the model was loaded without ``needs_reference``.
        """
        batch, tree = self._prepare(batch)
        with self._autocast():
            pairs, _ = (self.initial_head or self.head)(self._initial_states(batch, tree), batch, False)
        return batch.of_stream(pairs, None)[0]

    @torch.no_grad()
    def state_values(self, batch: Batch) -> torch.Tensor:
        """Values [K] alone, float32: what the value head says of the states before the batch's trainable tokens.

        Raises ``ValueError`` without a value head.
        """
        if self.value_head is None:
            raise ValueError("the model has no value head")
        batch, tree = self._prepare(batch)
        with self._autocast():
            hidden = _run(self.lm, batch, tree)
            states = self._critic_states(batch, tree, hidden)
        return self.value_head(states[batch.states])

    @torch.no_grad()
    def resumed_values(self, tokens: torch.Tensor, resumed: Resumed, places: torch.Tensor) -> torch.Tensor:
        """Values [k], float32, of the states at ``places`` (int64 [k], among ``resumed.fresh``) of a row ``tokens`` (int64 [N]).

        Only fresh tokens are computed. Raises ``ValueError`` without a joint value head.
        """
        if self.value_head is None or self.critic != "joint":
            raise ValueError("the model has no joint value head")
        tree = TreeMask(resumed.subtree_end, resumed.position_ids, resumed=resumed)
        fresh = resumed.fresh
        with self._autocast():
            positions = resumed.position_ids[fresh][None]
            out = self.lm.base_model(input_ids=tokens[fresh][None], position_ids=positions, use_cache=False, tree=tree)
        return self.value_head(out.last_hidden_state[0][torch.searchsorted(fresh, places)])

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the critic; they have a learning rate of their own."""
        parts = [part for part in (self.critic_trunk, self.value_head, self.soft_critic) if part is not None]
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the policy."""
        return [p for p in self.lm.parameters() if p.requires_grad]

    def changing_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that training changes, by name: the trained ones, and a target that follows them."""
        target = set() if self.soft_critic is None else {id(p) for p in self.soft_critic.target.parameters()}
        return {name: p for name, p in self.named_parameters() if p.requires_grad or id(p) in target}

    def move_target(self, decay: float) -> None:
        """Let the soft critic's target follow its Q network, where there is one; see ``SoftCritic.move_target``."""
        if self.soft_critic is not None:
            self.soft_critic.move_target(decay)

    def _prepare(self, batch: Batch) -> tuple[Batch, TreeMask]:
        device = self.head.weight.device
        backend = self.backend or ("flex" if device.type == "cuda" else "sdpa")
        if backend == "flex":
            batch = batch.padded(_FLEX_MULTIPLE)
        batch = batch.to(device)
        return batch, TreeMask(batch.subtree_end, batch.position_ids, backend)

    def _critic_states(self, batch: Batch, tree: TreeMask, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, d] that the value head reads."""
        if self.critic in ("shared", "joint"):
            return hidden if self.critic == "joint" else hidden.detach()
        if self.critic_trunk is not None:
            return _run(self.critic_trunk, batch, tree)
        return self._initial_states(batch, tree)

    @torch.no_grad()
    def _initial_states(self, batch: Batch, tree: TreeMask) -> torch.Tensor:
        """Hidden states [N, d] of the initial model."""
        if self.initial is not None:
            return _run(self.initial, batch, tree)
        with self._adapters_off():
            return _run(self.lm, batch, tree)

    def _soft_terms(
        self, batch: Batch, tree: TreeMask, hidden: torch.Tensor, pairs: torch.Tensor, want_q: bool, want_target: bool
    ) -> SoftTerms | None:
        """What the soft critic says, given the policy's hidden states [N, d] and log-probs [P] of the batch's pairs."""
        if self.soft_critic is None:
            return None
        head = self.initial_head or self.head
        with torch.no_grad():
            states = self._initial_states(batch, tree)
            initial_pairs = None if batch.choices is None else head(states, batch, False)[0]
        policy = TokenModel(Logits(hidden, self.head.weight, self.head.bias), pairs)
        reference = TokenModel(Logits(states, head.weight, head.bias), initial_pairs)

        def run(lm: PreTrainedModel) -> torch.Tensor:
            return _run(lm, batch, tree)

        return self.soft_critic(batch, run, policy, reference, want_q=want_q, want_target=want_target)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.compute_dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.head.weight.device.type, dtype=self.compute_dtype)

    @contextlib.contextmanager
    def _adapters_off(self) -> Iterator[None]:
        """The initial model inside a policy with adapters."""
        if not self.has_adapters:
            raise ValueError("the initial model is gone: load the policy with needs_reference=True")
        layers = _lora_layers(self.lm).values()
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def load_policy(
    config: ModelConfig,
    learner: LearnerConfig,
    *,
    needs_reference: bool = False,
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
    head_kind: HeadKind | None = None,
) -> PolicyModel:
    """Load a causal LM with the critic, reference and adapters that the learner's settings ask for.

    ``temperature`` is the rollout's sampling temperature. A joint head goes on from the folder's own, where it has one, which
    then must be of ``head_kind`` (None: of either). A short probe compares packed rows against the model's own forward pass, so that an
    architecture that packing does not fit is refused here.

    Raises ``ModelError`` where the model is missing, broken, or of an unsupported architecture.
    """
    path = resolve_model(config.path)
    lm = _load_causal_lm(path, config.trust_remote_code)
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # dropout would make log-probs differ from the rollout's
    _check_supported(lm, config.path)
    model = PolicyModel(
        lm,
        critic=learner.critic,
        critic_hidden=learner.critic_hidden,
        lora=learner.lora,
        needs_reference=needs_reference,
        temperature=temperature,
        chunk=learner.logprob_chunk,
        gradient_checkpointing=learner.gradient_checkpointing,
        compute_dtype=resolve_dtype(config.dtype),
    )
    if learner.critic == "joint" and model.value_head is not None and has_head(path):
        load_head(path, model.value_head, head_kind)
    return model.to(device)


def policy_state(model: PolicyModel, gather: Gather = lambda parameters: contextlib.nullcontext()) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's weights as (name in a Hugging Face checkpoint, tensor), adapters merged, tied weights once.

    ``gather`` makes sharded parameters whole while it is entered (ZeRO-3); a tensor is valid until the next is asked for.
    """
    lm = model.lm
    adapters = _lora_layers(lm)
    for name, parameter in lm.named_parameters():
        prefix, inside, rest = name.partition(".base_layer.")
        layer = adapters.get(prefix) if inside else None
        if layer is None and any(name.startswith(f"{adapter}.") for adapter in adapters):
            continue  # a low-rank factor; it is merged into its base weight
        factors = [p for n, p in layer.named_parameters() if not n.startswith("base_layer.")] if layer is not None else []
        with gather([parameter, *factors]):
            tensor = parameter.detach()
            if layer is not None and rest == "weight":
                tensor = tensor + layer.get_delta_weight(_ADAPTER).detach().to(tensor.dtype)
            plain = f"{prefix}.{rest}" if inside else name
            if getattr(lm, "_weight_conversions", None):  # architectures whose checkpoints are laid out otherwise
                yield from revert_weight_conversion(lm, {plain: tensor}).items()
            else:
                yield plain, tensor


def save_policy(model: PolicyModel, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write ``state`` (from ``policy_state``, whole tensors) with the model's configuration as a plain Hugging Face folder.

    Raises ``OSError``.
    """
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.lm.config)
    config.architectures = [type(model.lm).__name__]
    config.dtype = next(iter(state.values())).dtype
    config.save_pretrained(folder)
    if model.lm.generation_config is not None:
        model.lm.generation_config.save_pretrained(folder)
    try:
        save_torch_state_dict({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder)
    except SafetensorError as error:  # what safetensors makes of a write that failed
        raise OSError(errno.EIO, str(error), str(folder)) from error


_ADAPTER = "default"


def _run(lm: PreTrainedModel, batch: Batch, tree: TreeMask) -> torch.Tensor:
    """Last hidden states [N, d] of a row under the transformer of ``lm``."""
    trunk = lm.base_model
    out = trunk(input_ids=batch.tokens[None], position_ids=batch.position_ids[None], use_cache=False, tree=tree)
    return out.last_hidden_state[0]


def _hidden_size(lm: PreTrainedModel) -> int:
    return int(lm.get_output_embeddings().weight.shape[1])


def _load_causal_lm(path: Path, trust_remote_code: bool) -> PreTrainedModel:
    try:
        lm, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=TREE_ATTENTION,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot load a causal language model from {path}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"the checkpoint at {path} lacks {len(missing)} weights of its architecture, among them {missing[0]}")
    if info.get("mismatched_keys"):
        raise ModelError(f"the checkpoint at {path} holds weights of another shape: {sorted(info['mismatched_keys'])[0]}")
    return lm


@torch.no_grad()
def _check_supported(lm: PreTrainedModel, name: str) -> None:
    """Compare two short continuations of one prefix, packed as a tree, with the model's own forward pass on each."""
    a, b, c, d, e, f = (torch.arange(1, 7) * 31 % lm.config.get_text_config().vocab_size).tolist()
    batch = Batch.empty()
    batch = Batch(
        tokens=torch.tensor([a, b, c, d, e, f]),
        position_ids=torch.tensor([0, 1, 2, 3, 2, 3]),
        subtree_end=torch.tensor([6, 6, 4, 4, 6, 6]),
        predictors=torch.tensor([3, 5]),
        targets=torch.tensor([a, a]),
        stream_index=torch.arange(2),
        source=torch.arange(2),
        states=torch.tensor([3, 5]),
        bootstrap=batch.bootstrap,
        bootstrap_trajectory=batch.bootstrap_trajectory,
    )
    problem = f"{name}: architecture {type(lm).__name__} cannot be trained on packed rows"
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{problem}: it has no linear LM head")
    lm.eval()
    try:
        hidden = _run(lm, batch, TreeMask(batch.subtree_end, batch.position_ids))
    except (TypeError, AttributeError) as error:
        raise ModelError(f"{problem}: {error}") from error
    packed = F.log_softmax(head(hidden[batch.predictors]), dim=-1)
    lm.set_attn_implementation("eager")
    own = F.log_softmax(lm(torch.tensor([[a, b, c, d], [a, b, e, f]]), use_cache=False).logits[:, -1].float(), dim=-1)
    lm.set_attn_implementation(TREE_ATTENTION)
    difference = (packed - own).abs().max().item()
    if not difference < 1e-2:
        raise ModelError(
            f"{problem}: its log-probs differ by {difference:.3g} nats from the model's own. Architectures with "
            "recurrent or convolutional layers, or with post-processed logits, are not supported"
        )


def _add_adapters(lm: PreTrainedModel, lora: LoraConfig) -> None:
    try:
        import peft
    except ImportError as error:
        raise EnvironmentProblem("learner.lora needs peft: pip install peft") from error
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        peft.inject_adapter_in_model(settings, lm, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ModelError(f"learner.lora.target_modules: {error}") from error
    if not isinstance(lm.get_output_embeddings(), nn.Linear) or not isinstance(lm.get_input_embeddings(), nn.Embedding):
        raise ModelError("learner.lora.target_modules: adapters on the embeddings or the LM head are not supported")


def _lora_layers(lm: PreTrainedModel) -> dict[str, Any]:
    """The layers of ``lm`` that carry adapters, by name."""
    return {name: module for name, module in lm.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")}
