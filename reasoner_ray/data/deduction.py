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
from itertools import pairwise, product

from reasoner_ray.data.generated import Drawn, DrawnTask
from reasoner_ray.data.tasks import Item, register_task
from reasoner_ray.errors import ConfigError

INSTRUCTION = (
    "Prove it step by step, one sentence a line, each a fact, a rule, or what follows from one of each. "
    "End with a line: The answer is true. (or: The answer is false.)"
)
NAMES = ("Sally", "Max", "Rex", "Wren", "Polly", "Sam", "Stella", "Alex")
PROPERTIES = tuple("wooden red cold loud heavy shy bright sour round quick old soft green sweet tall dull".split())
MAX_SENTENCE = 200
"""Characters of a sentence that is still read."""
_SENTENCE = re.compile(r"(?:(?P<all>Each|Every) )?(?P<subject>.+?) (?P<verb>is|are) (?P<not>not )?(?:an? )?(?P<predicate>[^.]+)\.")
_ANSWER = re.compile(r"\s*The answer is (true|false)\.?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Statement:
    """``subject`` (a class of things, or one thing) is, or is not, ``predicate``. Nouns are in the singular."""

    subject: str
    predicate: str
    negated: bool
    is_rule: bool  # about all of a class


def read_statement(sentence: str) -> Statement | None:
    """What a sentence says; None where it is not of the forms in which rules and facts are written."""
    text = sentence.strip()
    found = _SENTENCE.fullmatch(text) if len(text) <= MAX_SENTENCE else None
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


def proves(lines: Sequence[str], context: Iterable[str], asked: str, answer: bool) -> bool:
    """Whether every line holds and one of them is ``asked``: strict proof accuracy, by which guesses earn nothing.

    ``asked`` is the statement in question or its opposite, whichever is true.
    """
    return all(check_proof(lines, context, answer)) and read_statement(asked) in [read_statement(line) for line in lines]


def _follows(statement: Statement, known: set[Statement], given: set[Statement]) -> bool:
    """Whether one rule of ``given`` and one fact of ``known`` say it."""
    rules = (r for r in given if r.is_rule and (r.predicate, r.negated) == (statement.predicate, statement.negated))
    return not statement.is_rule and any(Statement(statement.subject, rule.subject, False, False) in known for rule in rules)


@register_task("deduction")
class DeductionTask(DrawnTask):
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
        super().__init__(
            seed=seed,
            train_size=train_size,
            held_out_size=held_out_size,
            held_out_fraction=held_out_fraction,
            style=style,
            instruction=instruction,
        )
        if len(hops) != 2 or not 1 <= hops[0] <= hops[1] <= 20:
            raise ConfigError(f"task.args.hops: must be the fewest and the most, within 1..20 (got {list(hops)})")
        if not 1 <= distractors <= 20:
            raise ConfigError(f"task.args.distractors: must be in 1..20 (got {distractors})")
        self._hops, self._distractors = (hops[0], hops[1]), distractors

    def read_answer(self, text: str) -> str:
        """What votes among solutions: ``true`` or ``false`` as the scorer reads it; '' where the text does not say."""
        from reasoner_ray.scoring.deduction import final_truth  # scorers import the tasks

        return final_truth(text) or ""

    def check_steps(self, item: Item, steps: Sequence[str]) -> list[bool]:
        """Exact labels of steps: see ``check_proof``."""
        return check_proof(steps, item.info["context"], item.answer == "true")

    def _draw(self, source: random.Random, number: str) -> Drawn:
        question, context, answer, proof = draw_question(source, source.randint(*self._hops), self._distractors)
        info = {"context": context, "solution": "\n".join(proof)}
        return Drawn(Item(id=f"deduction-{number}", prompt=self._prompt(question), answer=answer, info=info), question)


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
