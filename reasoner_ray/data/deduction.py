"""Deduction over an invented ontology, in the manner of PrOntoQA (Saparov and He 2023, arXiv:2210.01240).

A question is a handful of rules and a fact; whether the statement asked about is true follows in a chain of single steps:

    Every zorb is a plim. Plims are not wooden. Each drell is wooden. Sally is a zorb. Is the statement "Sally is wooden" true or false?

    Sally is a zorb.
    Every zorb is a plim.
    Sally is a plim.
    Plims are not wooden.
    Sally is not wooden.
    The answer is false.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product

from reasoner_ray.data.questions import build_prompt, check_style
from reasoner_ray.data.tasks import Item, Task, is_held_out, register_task
from reasoner_ray.errors import ConfigError

INSTRUCTION = (
    "Prove it step by step, one sentence a line, each a fact, a rule, or what follows from one of each. "
    "End with a line: The answer is true. (or: The answer is false.)"
)
NAMES = ("Sally", "Max", "Rex", "Wren", "Polly", "Sam", "Stella", "Alex")
PROPERTIES = tuple("wooden red cold loud heavy shy bright sour round quick old soft green sweet tall dull".split())
_SENTENCE = re.compile(r"(?:(?P<all>Each|Every) )?(?P<subject>.+?) (?P<verb>is|are) (?P<not>not )?(?:an? )?(?P<predicate>[^.]+)\.")
_ANSWER = re.compile(r"\s*The answer is (true|false)\.?\s*", re.IGNORECASE)
_MAX_REPEATS = 1000  # draws in a row that bring nothing new before the space counts as used up


@dataclass(frozen=True, slots=True)
class Statement:
    """``subject`` (a class of things, or one thing) is, or is not, ``predicate``. Nouns are in the singular."""

    subject: str
    predicate: str
    negated: bool
    is_rule: bool  # about all of a class


def read_statement(sentence: str) -> Statement | None:
    """What a sentence says; None where it is not of the forms in which rules and facts are written."""
    found = _SENTENCE.fullmatch(sentence.strip())
    if found is None:
        return None
    is_rule = found["all"] is not None or found["verb"] == "are"
    subject = _singular(found["subject"]).lower() if is_rule else found["subject"]
    return Statement(subject, _singular(found["predicate"]).lower(), found["not"] is not None, is_rule)


def _singular(noun: str) -> str:
    return noun[:-3] + "y" if noun.endswith("ies") else noun.removesuffix("s")


def check_proof(lines: Sequence[str], context: Iterable[str], answer: bool) -> list[bool]:
    """Which lines hold: a sentence of the context, what one rule makes of a fact known so far, or the right answer.

    A line that does not hold is not known to those after it. An exact process label.
    """
    given = {s for s in map(read_statement, context) if s is not None}
    known, labels = {s for s in given if not s.is_rule}, []
    for line in lines:
        said = _ANSWER.fullmatch(line)
        if said is not None:
            labels.append((said[1].lower() == "true") is answer)
            continue
        statement = read_statement(line)
        holds = statement is not None and (statement in given or _follows(statement, known, given))
        if holds and statement is not None and not statement.is_rule:
            known.add(statement)
        labels.append(holds)
    return labels


def _follows(statement: Statement, known: set[Statement], given: set[Statement]) -> bool:
    """Whether one rule of ``given`` and one fact of ``known`` say it."""
    rules = (r for r in given if r.is_rule and (r.predicate, r.negated) == (statement.predicate, statement.negated))
    return not statement.is_rule and any(Statement(statement.subject, rule.subject, False, False) in known for rule in rules)


@register_task("deduction")
class DeductionTask(Task):
    """Questions of ``hops`` (fewest and most) class rules, as many true as false on average; a part of them is held out by content.

    ``distractors`` other classes have rules of their own, one of which says the opposite of the asked property, so that the last
    sentence alone does not give the answer away. An item's ``info`` has ``context`` (sentences) and ``solution``, the proof to be
    learnt by supervised fine-tuning. The held-out questions do not depend on ``seed``.
    """

    default_scorer = "deduction"

    def __init__(
        self,
        *,
        seed: int = 0,
        hops: Sequence[int] = (1, 5),
        distractors: int = 3,
        train_size: int = 4096,
        held_out_size: int = 512,
        held_out_fraction: float = 0.15,
        style: str = "text",
        instruction: str = INSTRUCTION,
    ) -> None:
        if len(hops) != 2 or not 1 <= hops[0] <= hops[1] <= 20:
            raise ConfigError(f"task.args.hops: must be the fewest and the most, within 1..20 (got {list(hops)})")
        if not 1 <= distractors <= 20:
            raise ConfigError(f"task.args.distractors: must be in 1..20 (got {distractors})")
        self._hops, self._distractors = (hops[0], hops[1]), distractors
        self._sizes, self._fraction, self._seed = (train_size, held_out_size), held_out_fraction, seed
        self._style, self._instruction = check_style(style), instruction

    def train(self) -> Sequence[Item]:
        """Questions drawn with the job's seed."""
        return self._train

    def held_out(self) -> Sequence[Item]:
        """The same questions for every seed."""
        return self._held_out

    def check_steps(self, item: Item, steps: Sequence[str]) -> list[bool]:
        """Exact labels of steps: see ``check_proof``."""
        return check_proof(steps, item.info["context"], item.answer == "true")

    @cached_property
    def _train(self) -> list[Item]:
        return self._collect(random.Random(f"deduction/train/{self._seed}"), self._sizes[0], "train", held_out=False)

    @cached_property
    def _held_out(self) -> list[Item]:
        return self._collect(random.Random("deduction/held_out"), self._sizes[1], "held_out", held_out=True)

    def _collect(self, source: random.Random, size: int, split: str, *, held_out: bool) -> list[Item]:
        items: dict[str, Item] = {}
        repeats = 0
        while len(items) < size and repeats < _MAX_REPEATS:
            question, context, answer, proof = draw_question(source, source.randint(*self._hops), self._distractors)
            if question in items or is_held_out(question, self._fraction) != held_out:
                repeats += 1
                continue
            repeats = 0
            prompt = f"{question}\n" if self._style == "text" else build_prompt(question, style="chat", instruction=self._instruction)
            info = {"context": context, "solution": "\n".join(proof)}
            items[question] = Item(id=f"deduction-{split}-{len(items)}", prompt=prompt, answer=answer, info=info)
        return list(items.values())


def draw_question(source: random.Random, hops: int, distractors: int) -> tuple[str, list[str], str, list[str]]:
    """A question, the sentences it gives, its answer (``true`` or ``false``) and the lines of the proof."""
    chain = source.sample(_CLASSES, hops + 2 + distractors)
    others, chain = chain[hops + 2 :], chain[: hops + 2]  # the chain goes on for a class past the one that decides
    name, asked = source.choice(NAMES), source.choice(PROPERTIES)
    negated, true = source.random() < 0.5, source.random() < 0.5
    up = [_rule(source, a, b) for a, b in pairwise(chain)]
    decides = _rule(source, chain[hops], asked, negated=negated)
    rest = [p for p in PROPERTIES if p != asked]
    noise = [_rule(source, c, source.choice(rest), negated=source.random() < 0.5) for c in (*chain, *others) if source.random() < 0.5]
    lures = [_rule(source, others[0], asked, negated=not negated)]
    lures += [_rule(source, other, source.choice(chain[1:])) for other in others]
    context = [*up, decides, *noise, *lures]
    source.shuffle(context)
    facts = [f"{name} is a {c}." for c in chain[: hops + 1]]
    last = f"{name} is {'not ' if negated else ''}{asked}."
    proof = [facts[0]]
    for rule, fact in zip(up[:hops], facts[1:], strict=True):
        proof += [rule, fact]
    proof += [decides, last, f"The answer is {'true' if true else 'false'}."]
    statement = f"{name} is {'not ' if negated == true else ''}{asked}"
    question = f'{" ".join(context)} {facts[0]} Is the statement "{statement}" true or false?'
    return question, [*context, facts[0]], "true" if true else "false", proof


def _rule(source: random.Random, subject: str, predicate: str, *, negated: bool = False) -> str:
    """A rule in one of three wordings; ``predicate`` is another class or a property."""
    no, is_class = ("not " if negated else ""), predicate in _CLASSES
    wording = source.choice(("Each", "Every", ""))
    if wording:
        return f"{wording} {subject} is {no}{'a ' if is_class else ''}{predicate}."
    return f"{subject.capitalize()}s are {no}{predicate}{'s' if is_class else ''}."


_CLASSES = tuple(
    first + middle + last
    for first, middle, last in product(("z", "pl", "dr", "gr", "b", "v", "kl", "tr"), "aeiou", ("rb", "mp", "ll", "nt", "g"))
)
"""Invented nouns: none begins with a vowel or ends in s or y, so each takes ``a`` and a plain plural."""
