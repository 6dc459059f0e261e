"""Public formats and the judge, on tiny random models that are built here: their scores are those of a plain forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2Model

from reasoner_ray.errors import ModelError, ScoringError
from reasoner_ray.prm.formats import JudgeModel, MathShepherdModel, QwenModel
from reasoner_ray.prm.pool import StepModelSpec, load_step_model
from reasoner_ray.prm.texts import JUDGE_PROMPT, judge_context, read_pattern, texts_of
from reasoner_ray.steps import Partial

SETTINGS: dict[str, Any] = {"question": r"user: (.*)\nassistant: ", "dtype": "float32", "tokens_per_microbatch": 200}
QUESTION, STEPS = "what is 2 + 3?", ["Step 1: add both", "so it is 5"]


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def partial(policy: Any) -> Partial:
    """What the policy wrote: a chat, and two steps that end with an empty line."""
    partial = Partial.root(policy.encode(f"user: {QUESTION}\nassistant: "))
    for step in STEPS:
        partial = partial.then(policy.encode(step + "\n\n"))
    return partial


@pytest.fixture(scope="module")
def shepherd_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with the tag as one token; its embeddings are drawn anew, so that the tag has one."""
    folder = tmp_path_factory.mktemp("shepherd")
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model_dir), AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["ки"])
    model.resize_token_embeddings(len(tokenizer))
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as Qwen2ForProcessRewardModel saves them: ``model.*`` and ``score.{0,2}.*``, no LM head."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["<extra_0>"])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.architectures = ["Qwen2ForProcessRewardModel"]
    config.save_pretrained(folder)
    weights = {f"model.{name}": tensor.clone() for name, tensor in Qwen2Model(config).state_dict().items()}
    for name, shape in {"score.0.weight": (32, 32), "score.0.bias": (32,), "score.2.weight": (2, 32), "score.2.bias": (2,)}.items():
        weights[name] = torch.randn(shape)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_math_shepherds_format(shepherd_dir: Path, tiny_model_dir: Path, partial: Partial) -> None:
    """Read as its model card says: softmax of the logits of ``+`` and ``-`` at the tags, of all steps in one text."""
    model = MathShepherdModel(str(shepherd_dir), str(tiny_model_dir), **SETTINGS)
    (scores,) = model.score([partial])
    tokenizer = AutoTokenizer.from_pretrained(shepherd_dir)
    text = f"{QUESTION} Step 1: add both ки\nStep 2: so it is 5 ки"
    ids = torch.tensor([tokenizer.encode(text)])
    answers = [tokenizer.encode(a)[0] for a in "+-"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(shepherd_dir, dtype=torch.float32)(ids).logits[0][:, answers]
    at_tags = torch.softmax(logits, -1)[ids[0] == tokenizer.convert_tokens_to_ids("ки")][:, 0]
    assert scores == pytest.approx(at_tags.tolist(), abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-4
    joined = Partial(partial.tokens, partial.ends[-1:], partial.start)
    fresh = MathShepherdModel(str(shepherd_dir), str(tiny_model_dir), **SETTINGS).score([joined])
    assert model.score([joined]) == fresh and abs(fresh[0][0] - scores[1]) > 1e-4, "the same tokens as one step are another text"


def test_qwens_format(qwen_dir: Path, tiny_model_dir: Path, partial: Partial) -> None:
    """Read as its model card says: softmax of the head's two logits at each ``<extra_0>``, the probability of class 1."""
    model = QwenModel(str(qwen_dir), str(tiny_model_dir), **SETTINGS)
    (scores,) = model.score([partial])
    tokenizer = AutoTokenizer.from_pretrained(qwen_dir)
    messages = [
        {"role": "system", "content": QwenModel.SYSTEM},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "<extra_0>".join(STEPS) + "<extra_0>"},
    ]
    ids = torch.tensor([tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False))])
    from safetensors.torch import load_file

    w = load_file(qwen_dir / "model.safetensors")
    trunk = Qwen2Model.from_pretrained(qwen_dir)
    with torch.no_grad():
        hidden = trunk(ids).last_hidden_state[0]
        logits = torch.relu(hidden @ w["score.0.weight"].T + w["score.0.bias"]) @ w["score.2.weight"].T + w["score.2.bias"]
    marks = ids[0] == tokenizer.convert_tokens_to_ids("<extra_0>")
    assert int(marks.sum()) == 2
    assert scores == pytest.approx(torch.softmax(logits, -1)[marks][:, 1].tolist(), abs=1e-5)
    before = model.tokens
    assert model.score([partial, partial.until(1)]) == [scores, scores[:1]] and model.tokens == before


def test_a_judge_says_yes_or_no(tiny_model_dir: Path, policy: Any, partial: Partial, shepherd_dir: Path) -> None:
    model = JudgeModel(str(tiny_model_dir), str(tiny_model_dir), yes="a", no="b", **SETTINGS)
    (scores,) = model.score([partial])
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    a, b = policy.encode("a")[0], policy.encode("b")[0]
    for i, score in enumerate(scores):
        asked = judge_context(policy, QUESTION, STEPS[: i + 1])
        with torch.no_grad():
            logits = lm(torch.tensor([asked])).logits[0, -1]
        assert score == pytest.approx(float(torch.softmax(logits[[a, b]], 0)[0]), abs=1e-5)
    text = policy.decode(judge_context(policy, QUESTION, STEPS))
    assert text.endswith("Step 2: so it is 5\n\nIs step 2 correct? Answer Yes or No.\nassistant: ")
    with pytest.raises(ModelError, match="'Yes' is 2 tokens"):
        JudgeModel(str(tiny_model_dir), str(tiny_model_dir), **SETTINGS)


def test_braces_are_text_in_questions_steps_and_instructions(policy: Any) -> None:
    """Only the three places are filled; LaTeX, sets and code keep theirs."""
    said = "Write \\boxed{}, {yes} or {no}. {question} / {steps} / {number} / {number}"
    text = policy.decode(judge_context(policy, "the set {1, 2} of {steps}?", ["x \\in {1}", "{number}"], said))
    assert "Write \\boxed{}, {yes} or {no}. the set {1, 2} of {steps}? / Step 1: x \\in {1}\nStep 2: {number} / 2 / 2" in text


def test_questions_in_prompts(policy: Any, partial: Partial) -> None:
    assert texts_of(partial, policy, read_pattern(SETTINGS["question"])) == (QUESTION, STEPS)
    assert texts_of(partial, policy, None)[0] == f"user: {QUESTION}\nassistant:"
    with pytest.raises(ScoringError, match="finds no question in the prompt"):
        texts_of(partial, policy, read_pattern("<(x)>"))
    for broken, why in (("(", "is no regular expression"), ("user", "needs a group")):
        with pytest.raises(ScoringError, match=why):
            read_pattern(broken)
    assert "{question}" in JUDGE_PROMPT


def test_the_format_is_found_by_what_is_in_the_folder(
    qwen_dir: Path, shepherd_dir: Path, tiny_model_dir: Path, tmp_path: Path, policy: Any
) -> None:
    """By a model's name only where its folder does not tell."""
    assert isinstance(load_step_model(StepModelSpec(model=str(qwen_dir), policy=str(tiny_model_dir))), QwenModel)
    with pytest.raises(ModelError, match=r"set the scorer's args\.format to math_shepherd, or to judge"):
        load_step_model(StepModelSpec(model=str(shepherd_dir), policy=str(tiny_model_dir)))
    shepherd = load_step_model(StepModelSpec(model=str(shepherd_dir), policy=str(tiny_model_dir), format="math_shepherd"))
    assert isinstance(shepherd, MathShepherdModel)
    with pytest.raises(ModelError, match="has no token <extra_0>"):
        load_step_model(StepModelSpec(model=str(shepherd_dir), policy=str(tiny_model_dir), format="qwen"))


def test_math_shepherds_checkpoint_is_known_by_its_name(
    qwen_dir: Path, shepherd_dir: Path, tiny_model_dir: Path, tmp_path: Path, policy: Any
) -> None:
    """Its configuration says only that it is a Mistral. What the folder, or the user, says comes first."""
    named = tmp_path / "peiyi9979" / "Math-Shepherd-Mistral-7B-PRM"
    named.parent.mkdir()
    named.symlink_to(shepherd_dir, target_is_directory=True)
    policy_name = str(tiny_model_dir)
    assert isinstance(load_step_model(StepModelSpec(model=str(named), policy=policy_name)), MathShepherdModel)
    with pytest.raises(ModelError, match="has no token <extra_0>"):
        load_step_model(StepModelSpec(model=str(named), policy=policy_name, format="qwen"))
    other = tmp_path / "math-shepherd-mistral-7b-prm"
    other.symlink_to(qwen_dir, target_is_directory=True)
    assert isinstance(load_step_model(StepModelSpec(model=str(other), policy=policy_name)), QwenModel)


def test_another_tokenizers_model_is_refused(shepherd_dir: Path, tiny_model_dir: Path) -> None:
    """A model trained here reads the policy's tokens: another vocabulary would score noise."""
    (shepherd_dir / "step_model.json").write_text(json.dumps({"kind": "prm", "hidden": []}))
    try:
        with pytest.raises(ModelError, match="reads tokens of another tokenizer"):
            load_step_model(StepModelSpec(model=str(shepherd_dir), policy=str(tiny_model_dir)))
    finally:
        (shepherd_dir / "step_model.json").unlink()


def test_a_long_solution_is_refused(tiny_model_dir: Path, partial: Partial) -> None:
    model = JudgeModel(str(tiny_model_dir), str(tiny_model_dir), yes="a", no="b", **SETTINGS)
    with pytest.raises(ScoringError, match="made for 1024 tokens"):
        model.score([partial.then([5] * 3000)])
