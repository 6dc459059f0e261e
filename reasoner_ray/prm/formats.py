"""Models of other formats: public process reward models, and a chat model that is asked to judge.

They have tokenizers and prompts of their own, so the policy's tokens are decoded for them, a step at a time. Whatever
the format, a score is read at the last token of a context that ends with the step.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from transformers import AutoModel

from reasoner_ray.config import ModelConfig
from reasoner_ray.errors import ModelError, ScoringError
from reasoner_ray.learner.attention import TREE_ATTENTION, TreeMask
from reasoner_ray.learner.model import load_policy
from reasoner_ray.learner.settings import LearnerConfig
from reasoner_ray.models import load_tokenizer, resolve_dtype, resolve_model
from reasoner_ray.packing import pack, unpack
from reasoner_ray.prm.incremental import Rows
from reasoner_ray.prm.model import CachedStepModel, check_length, longest_context
from reasoner_ray.prm.readings import read_at
from reasoner_ray.prm.texts import JUDGE_PROMPT, judge_context, read_pattern, single_token, texts_of
from reasoner_ray.steps import Partial


class TextStepModel(CachedStepModel):
    """Scores steps from their texts; a subclass writes the context and reads its last token."""

    def __init__(self, path: str, policy: str, *, question: str | None, tokens_per_microbatch: int) -> None:
        """``policy`` names the model whose tokens are scored. ``question`` is a regular expression whose first group is the
        question in a decoded prompt; None takes the whole prompt, special tokens left out.

        Raises ``ModelError``, and ``ScoringError`` for a pattern that is none."""
        super().__init__()
        self.folder = resolve_model(path)
        self.tokenizer = load_tokenizer(self.folder)
        self._theirs = load_tokenizer(resolve_model(policy))
        self._pattern = read_pattern(question)
        self._name, self._budget, self._longest = path, tokens_per_microbatch, longest_context(self.folder)

    @abstractmethod
    def context(self, question: str, steps: Sequence[str]) -> list[int]:
        """Token ids that end where the last of ``steps`` is judged. Raises ``ScoringError``."""

    @abstractmethod
    def _read(self, contexts: Sequence[list[int]]) -> list[float]:
        """The score at the last token of each context."""

    def _keys(self, partial: Partial) -> list[bytes]:
        """The tokens, and where they are cut: steps are written one by one into the context."""
        return [key + repr((partial.start, *partial.ends[: i + 1])).encode() for i, key in enumerate(super()._keys(partial))]

    def unknown(self, partials: Sequence[Partial]) -> int:
        """See ``StepModel.unknown``: the whole solution is read anew for each new step."""
        return sum(end for p in partials for end, key in zip(p.ends, self._keys(p), strict=True) if key not in self._known)

    def _compute(self, rows: Rows) -> list[float]:
        contexts = []
        for partial, steps in rows:
            question, texts = texts_of(partial, self._theirs, self._pattern)
            contexts += [self.context(question, texts[: step + 1]) for step in steps]
        for context in contexts:
            check_length(self._name, len(context), self._longest)
        return self._read(contexts)


class _YesNoModel(TextStepModel):
    """A causal language model that says one of two tokens: the score is ``p(yes) / (p(yes) + p(no))``."""

    def __init__(self, path: str, policy: str, *, question: str | None, dtype: Any, tokens_per_microbatch: int, yes: str, no: str) -> None:
        super().__init__(path, policy, question=question, tokens_per_microbatch=tokens_per_microbatch)
        self._answers = [single_token(self.tokenizer, text, path) for text in (yes, no)]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._lm = load_policy(ModelConfig(path=str(self.folder), dtype=dtype), LearnerConfig(critic="none"), device=device).eval()

    @torch.no_grad()
    def _read(self, contexts: Sequence[list[int]]) -> list[float]:
        rows = [read_at(context, [len(context)], [0.0], behind=answer) for context in contexts for answer in self._answers]
        batches = pack(rows, tokens_per_microbatch=self._budget, bootstrap="none")
        parts = [self._lm(batch, want_values=False, want_entropy=False, want_q=False, want_target=False).logprobs for batch in batches]
        self.tokens += sum(batch.n_packed for batch in batches)
        yes, no = unpack(batches, parts, len(rows)).view(-1, 2).unbind(1)
        found: list[float] = torch.sigmoid(yes - no).tolist()
        return found


class MathShepherdModel(_YesNoModel):
    """Math-Shepherd's format (Wang et al. 2024, arXiv 2312.08935): ``+`` or ``-`` predicted at a tag behind each step, unshifted."""

    def __init__(self, path: str, policy: str, *, tag: str = "ки", good: str = "+", bad: str = "-", **settings: Any) -> None:
        super().__init__(path, policy, yes=good, no=bad, **settings)
        self._tag, self._tag_id = tag, self.tokenizer.encode(tag, add_special_tokens=False)[-1]

    def context(self, question: str, steps: Sequence[str]) -> list[int]:
        """See ``TextStepModel.context``."""
        numbered = (step if re.match(r"Step \d+:", step) else f"Step {i}: {step}" for i, step in enumerate(steps, start=1))
        ids = [int(t) for t in self.tokenizer.encode(f"{question} " + "\n".join(f"{step} {self._tag}" for step in numbered))]
        if ids[-1:] == [self.tokenizer.eos_token_id]:
            ids.pop()
        if ids[-1] != self._tag_id:
            raise ScoringError(f"{self._name}: the tag {self._tag!r} is not one token behind a step; set the scorer's args.tag")
        return ids


class JudgeModel(_YesNoModel):
    """A chat model that is asked whether the last step is correct: the probability of Yes against No as its first token."""

    def __init__(
        self, path: str, policy: str, *, yes: str = "Yes", no: str = "No", instruction: str = JUDGE_PROMPT, **settings: Any
    ) -> None:
        super().__init__(path, policy, yes=yes, no=no, **settings)
        self._instruction = instruction

    def context(self, question: str, steps: Sequence[str]) -> list[int]:
        """See ``TextStepModel.context``."""
        return judge_context(self.tokenizer, question, steps, self._instruction)


class QwenModel(TextStepModel):
    """Qwen2.5-Math-PRM's format (Zhang et al. 2025, arXiv 2501.07301): ``<extra_0>`` behind each step, a head of two logits there."""

    SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
    MARK = "<extra_0>"

    def __init__(self, path: str, policy: str, *, question: str | None, dtype: Any, tokens_per_microbatch: int) -> None:
        super().__init__(path, policy, question=question, tokens_per_microbatch=tokens_per_microbatch)
        self._mark = self.tokenizer.convert_tokens_to_ids(self.MARK)
        if not isinstance(self._mark, int) or self._mark == self.tokenizer.unk_token_id:
            raise ModelError(f"{path}: its tokenizer has no token {self.MARK}, so it is not of Qwen2.5-Math-PRM's format")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._head = _two_logit_head(self.folder, self._device)
        self._trunk = AutoModel.from_pretrained(self.folder, dtype=resolve_dtype(dtype), attn_implementation=TREE_ATTENTION)
        self._trunk = self._trunk.to(self._device).eval()

    def context(self, question: str, steps: Sequence[str]) -> list[int]:
        """See ``TextStepModel.context``."""
        messages = [
            {"role": "system", "content": self.SYSTEM},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "".join(step + self.MARK for step in steps)},
        ]
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
        ids = [int(t) for t in self.tokenizer.encode(text, add_special_tokens=False)]
        if self._mark not in ids:
            raise ScoringError(f"{self._name}: the chat template leaves {self.MARK} out")
        return ids[: len(ids) - ids[::-1].index(self._mark)]

    @torch.no_grad()
    def _read(self, contexts: Sequence[list[int]]) -> list[float]:
        rows = [read_at(context, [len(context)], [0.0]) for context in contexts]
        parts, batches = [], pack(rows, tokens_per_microbatch=self._budget, bootstrap="none")
        for batch in batches:
            self.tokens += batch.n_packed
            on = (batch.padded(128) if self._device.type == "cuda" else batch).to(self._device)
            tree = TreeMask(on.subtree_end, on.position_ids, "flex" if self._device.type == "cuda" else "sdpa")
            out = self._trunk(input_ids=on.tokens[None], position_ids=on.position_ids[None], use_cache=False, tree=tree)
            hidden = out.last_hidden_state[0][on.states].float()
            first, first_bias, last, last_bias = self._head
            logits = F.linear(F.relu(F.linear(hidden, first, first_bias)), last, last_bias)
            parts.append(torch.softmax(logits, dim=-1)[:, 1])
        found: list[float] = unpack(batches, parts, len(rows)).tolist()
        return found


def _two_logit_head(folder: Path, device: torch.device) -> list[torch.Tensor]:
    """Weights and biases of ``score``: Linear(d, d), ReLU, Linear(d, 2), float32. Raises ``ModelError``."""
    names = ["score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"]
    found: dict[str, torch.Tensor] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as weights:
                inside = set(weights.keys())
                found |= {name: weights.get_tensor(name).float().to(device) for name in names if name in inside}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: its weights cannot be read: {error}") from error
    missing = [name for name in names if name not in found]
    if missing or found["score.2.weight"].shape[0] != 2:
        raise ModelError(f"{folder} has no head of two logits (score.0, score.2), so it is not of Qwen2.5-Math-PRM's format")
    return [found[name] for name in names]
