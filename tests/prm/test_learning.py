"""One learner rank in this process: what the supervised kinds optimise, and that training and scoring read the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasoner_ray.config import JobConfig
from reasoner_ray.errors import ModelError, ScoringError
from reasoner_ray.learner.heads import read_head_info
from reasoner_ray.learner.learner import Learner
from reasoner_ray.learner.model import load_policy
from reasoner_ray.learner.predict import predict
from reasoner_ray.prm.examples import Example, Kind
from reasoner_ray.prm.metrics import auc
from reasoner_ray.prm.model import ProcessModel
from reasoner_ray.steps import Partial
from reasoner_ray.trajectory import Trajectory, flatten
from tests.prm.conftest import make_examples

Job = Callable[..., JobConfig]
KINDS: list[Kind] = ["sft", "prm", "value"]


def rows(config: JobConfig, examples: list[Example]) -> list[Trajectory]:
    assert config.kind != "rl"
    return [e.trajectory(config.kind, config.supervised) for e in examples]


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in learner.engine.policy.named_parameters() if p.requires_grad}


def trained(config: JobConfig, examples: list[Example], steps: int) -> tuple[Learner, list[dict[str, float]]]:
    learner = Learner(config)
    return learner, [learner.train_step([rows(config, examples)]) for _ in range(steps)]


def by_hand(kind: Kind, model: Any, head: Any, examples: list[Example]) -> torch.Tensor:
    """The loss of the step, one sequence at a time through transformers' own forward pass."""
    terms = []
    for e in examples:
        tokens, ends = torch.tensor([e.partial.tokens]), e.partial.ends
        out = model(tokens, output_hidden_states=True, use_cache=False)
        if kind == "sft":
            log = F.log_softmax(out.logits[0].float(), -1)
            terms += [-log[t - 1, e.partial.tokens[t]] for t in range(e.partial.start, len(e.partial.tokens))]
            continue
        states = out.hidden_states[-1][0]
        if kind == "prm":
            for end, label in zip(ends, e.labels, strict=True):
                logit, y = head(states[end - 1 : end])[0], torch.tensor(label)
                terms.append(-(y * F.logsigmoid(logit) + (1 - y) * F.logsigmoid(-logit)))
        else:
            terms += [(head(states[end - 1 : end])[0] - e.reward) ** 2 for end in (e.partial.start, *ends)]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_the_one_of_the_paper(kind: Kind, job: Job, tiny_model_dir: Path) -> None:
    """Two AdamW steps by hand: the same losses and, at the end, the same weights."""
    config, examples = job(kind, learner={"lr": 1e-4, "critic_lr": 1e-3}), make_examples(6)
    learner, metrics = trained(config, examples, 2)

    policy = load_policy(config.model, config.learner)
    own, head = policy.lm, policy.value_head
    own.set_attn_implementation("eager")
    groups = [{"params": policy.policy_parameters(), "lr": 1e-4}, {"params": policy.critic_parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=config.learner.betas, weight_decay=0.0)
    for step in range(2):
        loss = by_hand(kind, own, head, examples)
        assert metrics[step]["learner/loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], config.learner.max_grad_norm)
        assert metrics[step]["learner/grad_norm"] == pytest.approx(float(norm), rel=1e-3)
        optimizer.step()
    expected = dict(policy.named_parameters())
    for name, value in weights(learner).items():
        torch.testing.assert_close(value, expected[name].detach(), atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_does_not_depend_on_packing(kind: Kind, job: Job) -> None:
    examples = make_examples(12)
    whole, expected = trained(job(kind, learner={"lr": 1e-4}), examples, 2)
    for cut in ({"tokens_per_microbatch": 20}, {"tokens_per_microbatch": 50, "share_prefixes": False}):
        other, metrics = trained(job(kind, learner={"lr": 1e-4, **cut}), examples, 2)
        assert metrics[1]["learner/micro_batches"] > 1
        assert metrics[1]["learner/loss"] == pytest.approx(expected[1]["learner/loss"], rel=1e-5)
        for name, value in weights(whole).items():
            torch.testing.assert_close(weights(other)[name], value, atol=1e-5, rtol=0)


def test_prompts_are_masked(job: Job) -> None:
    """The loss and its gradient are those of the answer: another prompt's own tokens are never a target."""
    example = make_examples(1)[0]
    streams = flatten(rows(job("sft"), [example]))
    assert streams.n_tokens == len(example.partial.tokens) - example.partial.start


def test_a_step_is_read_at_its_last_token(job: Job, tmp_path: Path) -> None:
    """The convention: what a head says of a step is a function of the hidden state of its last token, unshifted.

    Scores of training, of scoring and of a plain forward pass agree; read one token earlier or later they do not.
    """
    config, examples = job("prm"), make_examples(8)
    learner, _ = trained(config, examples, 3)
    places, said = predict(learner, rows(config, examples))
    logits = torch.zeros(len(said)).index_put((places,), said)
    learner.export(tmp_path / "model")
    scorer = ProcessModel(str(tmp_path / "model"), dtype="float32")
    scores = scorer.score([e.partial for e in examples])
    assert [s for each in scores for s in each] == pytest.approx(torch.sigmoid(logits).tolist(), abs=1e-5)

    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    head = learner.engine.policy.value_head
    assert head is not None
    read: dict[int, list[float]] = {-1: [], 0: [], 1: []}
    with torch.no_grad():
        for e in examples:
            hidden = lm(torch.tensor([[*e.partial.tokens, 20]]), output_hidden_states=True).hidden_states[-1][0]
            for shift, values in read.items():
                values += torch.sigmoid(head(hidden[[end - 1 + shift for end in e.partial.ends]])).tolist()
    assert read[0] == pytest.approx(torch.sigmoid(logits).tolist(), abs=1e-5)
    for shift in (-1, 1):
        assert np.abs(np.array(read[shift]) - torch.sigmoid(logits).numpy()).max() > 1e-3, "the test would not see a shift"


def test_a_step_model_learns_and_its_folder_says_what_it_is(job: Job, tmp_path: Path, tiny_model_dir: Path) -> None:
    config = job("prm", supervised={"labels": "hard"})
    learner = Learner(config)
    losses = [learner.train_step([rows(config, make_examples(64, seed=100 + step))])["learner/loss"] for step in range(60)]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4), "an untrained head says a half"
    assert losses[-1] < 0.3
    learner.export(tmp_path / "model")
    scorer = ProcessModel(str(tmp_path / "model"), dtype="float32")
    fresh = make_examples(40, seed=1)
    scores = scorer.score([e.partial for e in fresh])
    found = auc(np.array([s for each in scores for s in each]), np.array([y > 0 for e in fresh for y in e.labels]))
    assert found > 0.9, "a planted slip is seen in solutions that were never learnt"
    info = read_head_info(tmp_path / "model")
    assert (info.kind, info.hidden, info.labels, info.base) == ("prm", (), "hard", str(tiny_model_dir))
    with pytest.raises(ModelError, match=r"holds no process reward or value model .*kind: prm"):
        ProcessModel(str(tiny_model_dir))


def test_training_goes_on_from_a_folder_with_a_head(job: Job, tmp_path: Path) -> None:
    examples = make_examples(8)
    first, _ = trained(job("value"), examples, 3)
    first.export(tmp_path / "model")
    again = Learner(job("value", model={"path": str(tmp_path / "model"), "dtype": "float32"}))
    places, before = predict(first, rows(job("value"), examples))
    same, after = predict(again, rows(job("value"), examples))
    assert places.equal(same) and float(before.abs().max()) > 1e-3
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    with pytest.raises(ModelError, match=r"set learner\.critic_hidden=\[\]"):
        Learner(job("value", model={"path": str(tmp_path / "model"), "dtype": "float32"}, learner={"critic_hidden": [8]}))


def test_only_new_steps_are_computed(job: Job, tmp_path: Path) -> None:
    Learner(job("prm")).export(tmp_path / "model")
    parent = Partial.root([30, 31, 32]).then([40, 41]).then([50])
    children = [parent.then([60 + i, 61]) for i in range(4)]
    for kept, computed in ((1000, 4 * 2), (0, 6 + 4 * 2)):  # without memory the prefix that siblings share is computed once more
        scorer = ProcessModel(str(tmp_path / "model"), dtype="float32", kept_tokens=kept)
        first = scorer.score([parent])
        assert scorer.tokens == 6
        scores = scorer.score(children)
        assert [s[:2] for s in scores] == [first[0]] * 4
        assert scorer.tokens == 6 + computed
        assert scorer.score([*children, parent]) == [*scores, first[0]]
        assert scorer.tokens == 6 + computed, "what is known costs nothing"
        assert scorer.score([]) == [] and scorer.score([Partial.root([5])]) == [[]]


def grown(rng: np.random.Generator, trees: int, steps: int) -> list[list[Partial]]:
    """What a search asks for, call by call: in each tree a few siblings behind one of those of the call before."""
    prompts = [Partial.root(rng.integers(20, 500, rng.integers(1, 9)).tolist()) for _ in range(trees)]
    calls, at = [], prompts
    for _ in range(steps):
        families = [[p.then(rng.integers(20, 500, rng.integers(1, 6)).tolist()) for _ in range(rng.integers(1, 4))] for p in at]
        calls.append([p for family in families for p in family])
        at = [family[int(rng.integers(0, len(family)))] for family in families]
    return calls


@pytest.mark.parametrize(("kept", "budget"), [(100_000, 1000), (100_000, 7), (40, 1000), (10, 15)])
def test_remembered_prefixes_change_no_score(kept: int, budget: int, job: Job, tmp_path: Path) -> None:
    """Trees that grow side by side, with plenty of memory, with too little, and cut into many passes; another cut of the same steps."""
    learner, _ = trained(job("prm"), make_examples(8), 2)
    learner.export(tmp_path / "model")
    plain = ProcessModel(str(tmp_path / "model"), dtype="float32", kept_tokens=0)
    scorer = ProcessModel(
        str(tmp_path / "model"), dtype="float32", kept_tokens=kept, tokens_per_microbatch=budget, cached=5 if kept == 40 else 10_000
    )
    rng = np.random.default_rng(kept + budget)
    calls = grown(rng, trees=5, steps=6)
    for partials in calls:
        for one, other in zip(scorer.score(partials), plain.score(partials), strict=True):
            assert one == pytest.approx(other, abs=1e-5)
    assert kept < 1000 or scorer.tokens < plain.tokens / 2
    joined = [Partial(p.tokens, (p.ends[0], p.ends[-1]), p.start) for p in calls[-1]]
    finer = [Partial(p.tokens, tuple(range(p.start + 1, len(p.tokens) + 1)), p.start) for p in calls[-1]]
    for partials in (joined, finer):
        for one, other in zip(scorer.score(partials), plain.score(partials), strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_a_small_cache_gives_the_same_scores(job: Job, tmp_path: Path) -> None:
    examples = make_examples(6)
    learner, _ = trained(job("prm"), examples, 2)
    learner.export(tmp_path / "model")
    partials = [e.partial for e in examples]
    expected = ProcessModel(str(tmp_path / "model"), dtype="float32").score(partials)
    small = ProcessModel(str(tmp_path / "model"), dtype="float32", tokens_per_microbatch=10, cached=2)
    for _ in range(2):
        for one, other in zip(small.score(partials), expected, strict=True):
            assert one == pytest.approx(other, abs=1e-6)


def test_foreign_tokens_are_refused(job: Job, tmp_path: Path) -> None:
    Learner(job("prm")).export(tmp_path / "model")
    scorer = ProcessModel(str(tmp_path / "model"), dtype="float32")
    with pytest.raises(ScoringError, match="must share their tokenizer"):
        scorer.score([Partial.root([5]).then([100_000])])
    with pytest.raises(ScoringError, match="made for 1024 tokens; a solution has 1101"):
        scorer.score([Partial.root([5]).then([6] * 1100)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_continues_to_the_same_weights(kind: Kind, job: Job, tmp_path: Path) -> None:
    examples = make_examples(8)
    straight, _ = trained(job(kind), examples, 3)
    first, _ = trained(job(kind), examples, 2)
    first.save(tmp_path / "state")
    second = Learner(job(kind))
    second.load(tmp_path / "state")
    second.train_step([rows(job(kind), examples)])
    assert all(value.equal(weights(second)[name]) for name, value in weights(straight).items())


@pytest.mark.parametrize("way", ["adapters", "untied"])
def test_other_models_train_and_score_alike(way: str, job: Job, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Low-rank adapters, merged at the export; and an LM head of its own, which no loss reads and nothing changes."""
    learner_settings, source = {}, tiny_model_dir
    if way == "adapters":
        learner_settings = {"lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}}
    else:
        source = tmp_path / "untied"
        lm = AutoModelForCausalLM.from_pretrained(tiny_model_dir, tie_word_embeddings=False)
        lm.save_pretrained(source)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(source)
    config, examples = job("prm", learner=learner_settings, model={"path": str(source)}), make_examples(8)
    learner, metrics = trained(config, examples, 4)
    assert metrics[-1]["learner/loss"] < metrics[0]["learner/loss"]
    policy, names = learner.engine.policy, set(weights(learner))
    assert (policy.head.weight is policy.lm.get_input_embeddings().weight) == (way == "adapters")
    if way == "adapters":
        assert all("lora_" in n or n.startswith("value_head.") for n in names)
    else:
        assert not any("lm_head" in n or n.startswith("head.") for n in names) and any("embed_tokens" in n for n in names)
    learner.export(tmp_path / "model")
    places, said = predict(learner, rows(config, examples))
    logits = torch.zeros(len(said)).index_put((places,), said)
    scores = ProcessModel(str(tmp_path / "model"), dtype="float32").score([e.partial for e in examples])
    assert [s for each in scores for s in each] == pytest.approx(torch.sigmoid(logits).tolist(), abs=1e-5)
