"""Steps as texts, for models that do not read the policy's tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reasoner_ray.errors import ModelError, ScoringError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.steps import Partial

JUDGE_PROMPT = (
    "Here is a question and the beginning of a solution to it.\n\nQuestion: {question}\n\n{steps}\n\n"
    "Is step {number} correct? Answer Yes or No."
)


def read_pattern(question: str | None) -> re.Pattern[str] | None:
    """The regular expression ``question``. Raises ``ScoringError`` where it is none with a group."""
    if question is None:
        return None
    try:
        pattern = re.compile(question, re.DOTALL)
    except re.error as error:
        raise ScoringError(f"args.question={question!r} is no regular expression: {error}") from error
    if not pattern.groups:
        raise ScoringError(f"args.question={question!r} needs a group: what it matches is the question")
    return pattern


def texts_of(partial: Partial, tokenizer: PreTrainedTokenizerBase, pattern: re.Pattern[str] | None) -> tuple[str, list[str]]:
    """The question and the steps of a partial solution, without special tokens and the white space around them.

    Without a ``pattern`` the whole prompt is the question. Raises ``ScoringError`` where the pattern finds none.
    """
    steps = [str(tokenizer.decode(list(step), skip_special_tokens=True)).strip() for step in partial.steps]
    if pattern is None:
        return str(tokenizer.decode(list(partial.prompt), skip_special_tokens=True)).strip(), steps
    text = str(tokenizer.decode(list(partial.prompt), skip_special_tokens=False))
    found = pattern.search(text)
    if found is None:
        raise ScoringError(f"args.question={pattern.pattern!r} finds no question in the prompt {text!r:.200}")
    return found.group(1).strip(), steps


def judge_context(tokenizer: PreTrainedTokenizerBase, question: str, steps: Sequence[str], instruction: str = JUDGE_PROMPT) -> list[int]:
    """The chat that asks whether the last of ``steps`` is correct, up to where the answer begins. Raises ``ScoringError``."""
    if not getattr(tokenizer, "chat_template", None):
        raise ScoringError("a judge is asked in a chat, and its tokenizer has no chat template; take a chat model")
    listed = "\n".join(f"Step {i}: {step}" for i, step in enumerate(steps, start=1))
    content = _filled(instruction, {"question": question, "steps": listed, "number": str(len(steps))})
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    return [int(t) for t in tokenizer.encode(str(text), add_special_tokens=False)]


def _filled(instruction: str, values: dict[str, str]) -> str:
    """The instruction with its places filled; every other brace, of the instruction or of a value, is text (\\boxed{}, a set)."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda match: values[match.group()[1:-1]], instruction)


def single_token(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> int:
    """The one token that ``text`` is. Raises ``ModelError``."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(f"{name}: {text!r} is {len(ids)} tokens of its tokenizer, and an answer must be one; choose another word")
    return int(ids[0])
