"""Games with numbers (Game of 24, Countdown): exact arithmetic, every solution, solutions as steps, an exact checker.

A solution is one operation a line, each with the numbers that are then left, and the expression at the end:

    13 - 9 = 4 (left: 4 4 10)
    10 - 4 = 6 (left: 4 6)
    6 * 4 = 24 (left: 24)
    The answer is (10 - (13 - 9)) * 4 = 24

reasoning-gym has both games, but its verifiers are not exact: they accept ``4!`` for 24, and that of ``puzzle24`` does not
look at which numbers were used.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from math import gcd

SIGNS = "+-*/"
MAX_EXPRESSION = 300
"""Characters of an expression that is still read."""
_WRITTEN_AS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
_Ratio = tuple[int, int]
"""A rational number in lowest terms, denominator positive: its hash and sums cost a tenth of those of ``Fraction``."""
_PLAIN = re.compile(r"[0-9+\-*/() ]+")
_NUMBER = r"-?\d+(?:/\d+)?"
_STEP = re.compile(rf"({_NUMBER}) ([-+*/]) ({_NUMBER}) = ({_NUMBER}) \(left: ({_NUMBER}(?: {_NUMBER})*)\)")
_ANSWER = re.compile(r"The answer is (.+?)\.?")


@dataclass(frozen=True, slots=True)
class Term:
    """A number that is left, and the expression it came from."""

    value: Fraction
    text: str
    sign: str = ""  # of the expression's outermost operation; empty for a number that was given


@dataclass(frozen=True, slots=True)
class Solution:
    """Lines of operations that lead to the target, the expression, and how unpleasant it is to compute."""

    lines: tuple[str, ...]
    expression: str
    cost: tuple[int, int, int]  # results that are no integers, that are negative, divisions

    def write(self, target: int) -> str:
        """The lines, then the expression."""
        return "\n".join([*self.lines, f"The answer is {self.expression} = {target}"])


def apply(sign: str, a: Fraction, b: Fraction) -> Fraction | None:
    """``a sign b``, exactly; None for a division by zero."""
    if sign == "+":
        return a + b
    if sign == "-":
        return a - b
    if sign == "*":
        return a * b
    return a / b if b else None


def is_reachable(numbers: Sequence[Fraction | int], target: int) -> bool:
    """Whether the target can be made of all of ``numbers``, each used once. Exact; answers are kept."""
    return _reachable(tuple(sorted((n.numerator, n.denominator) for n in numbers)), target)


@lru_cache(maxsize=1_000_000)
def _reachable(numbers: tuple[_Ratio, ...], target: int) -> bool:
    if len(numbers) == 1:
        return numbers[0] == (target, 1)
    if len(numbers) == 2:
        return _pair_makes(*numbers[0], *numbers[1], target)
    for i, j in combinations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        if any(_reachable(tuple(sorted([*rest, result])), target) for result in _results(*numbers[i], *numbers[j])):
            return True
    return False


def _pair_makes(p: int, q: int, r: int, s: int, target: int) -> bool:
    """Whether an operation on p/q and r/s gives the target."""
    a, b, wanted = p * s, r * q, target * q * s
    if wanted in (a + b, p * r, a - b, b - a):
        return True
    return (r != 0 and a == target * b) or (p != 0 and b == target * a)


def _results(p: int, q: int, r: int, s: int) -> set[_Ratio]:
    """What one operation can make of p/q and r/s."""
    a, b, below = p * s, r * q, q * s
    found = {_ratio(a + b, below), _ratio(p * r, below), _ratio(a - b, below), _ratio(b - a, below)}
    if b:
        found.add(_ratio(a, b))
    if a:
        found.add(_ratio(b, a))
    return found


def _ratio(above: int, below: int) -> _Ratio:
    """In lowest terms, as ``Fraction`` has it."""
    divisor = gcd(above, below)
    return (above // divisor, below // divisor) if below > 0 else (-above // divisor, -below // divisor)


def solve(numbers: Sequence[int], target: int) -> list[Solution]:
    """Every solution, the pleasant ones first; those that differ only in the order of a sum or product count once.

    Takes milliseconds for four numbers, seconds for five.
    """
    found: dict[tuple[str, ...], Solution] = {}
    for solution in _search(tuple(Term(Fraction(n), str(n)) for n in sorted(numbers)), target, (), (0, 0, 0)):
        found.setdefault(solution.lines, solution)
    return sorted(found.values(), key=lambda s: (s.cost, s.lines))


def _search(terms: tuple[Term, ...], target: int, lines: tuple[str, ...], cost: tuple[int, int, int]) -> Iterator[Solution]:
    if len(terms) == 1:
        if terms[0].value == target:
            yield Solution(lines, terms[0].text, cost)
        return
    for i, j in combinations(range(len(terms)), 2):
        rest = [t for k, t in enumerate(terms) if k not in (i, j)]
        values = [t.value for t in rest]
        for sign, a, b in operations(terms[i], terms[j]):
            value = apply(sign, a.value, b.value)
            if value is None or not is_reachable([*values, value], target):
                continue
            left = tuple(sorted([*rest, join_terms(sign, a, b, value)], key=lambda t: t.value))
            line = write_step(a.value, sign, b.value, [t.value for t in left])
            uglier = (cost[0] + (value.denominator != 1), cost[1] + (value < 0), cost[2] + (sign == "/"))
            yield from _search(left, target, (*lines, line), uglier)


def operations(a: Term, b: Term) -> Iterator[tuple[str, Term, Term]]:
    """The operations on two terms, operands in order; sums and products have the larger one first."""
    small, large = (a, b) if a.value <= b.value else (b, a)
    yield from ((sign, large, small) for sign in SIGNS)
    if small.value != large.value:
        yield from (("-", small, large), ("/", small, large))


def join_terms(sign: str, a: Term, b: Term, value: Fraction) -> Term:
    """The term ``a sign b``, with brackets where they are needed."""
    left = f"({a.text})" if sign in "*/" and a.sign in ("+", "-") else a.text
    needs = {"+": (), "-": ("+", "-"), "*": ("+", "-"), "/": ("+", "-", "*", "/")}[sign]
    right = f"({b.text})" if b.sign and b.sign in needs else b.text
    return Term(value, f"{left} {sign} {right}", sign)


def write_step(a: Fraction, sign: str, b: Fraction, left: Sequence[Fraction]) -> str:
    """One line of a solution; ``left`` are the numbers after it."""
    return f"{a} {sign} {b} = {apply(sign, a, b)} (left: {' '.join(map(str, left))})"


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an expression of non-negative integers, ``+ - * /`` and brackets, and the integers in it.

    None where it is anything else (signs before a number, powers, factorials, names), divides by zero, or is too long.
    """
    text = expression.translate(_WRITTEN_AS).strip()
    if len(text) > MAX_EXPRESSION or not _PLAIN.fullmatch(text):
        return None
    try:
        tree = ast.parse(text, mode="eval")
        numbers: list[int] = []
        return _value(tree.body, numbers), numbers
    except (SyntaxError, ArithmeticError, ValueError, RecursionError, MemoryError):  # MemoryError: too many brackets for Python's parser
        return None


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    """Raises ``ValueError`` for what the games do not allow, ``ZeroDivisionError``."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    signs: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
    if not isinstance(node, ast.BinOp) or type(node.op) not in signs:
        raise ValueError("not an operation of the game")
    result = apply(signs[type(node.op)], _value(node.left, numbers), _value(node.right, numbers))
    if result is None:
        raise ZeroDivisionError
    return result


def is_solution(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Whether ``EXPRESSION`` or ``EXPRESSION = TARGET`` makes the target of all of ``numbers``, each used once."""
    expression, equals, right = answer.partition("=")
    found = evaluate(expression)
    if found is None or (equals and right.strip() != str(target)):
        return False
    value, used = found
    return value == target and Counter(used) == Counter(numbers)


def check_lines(lines: Sequence[str], numbers: Sequence[int], target: int) -> list[bool]:
    """Which steps are right: the numbers are there, the arithmetic holds, and the target can still be reached.

    An exact process label. After a wrong step every later one is wrong as well; the last line must be the answer's.
    """
    left: list[Fraction] | None = [Fraction(n) for n in numbers]
    labels = []
    for line in map(str.strip, lines):
        answer = _ANSWER.fullmatch(line)
        if left is None:
            labels.append(False)
        elif answer is not None:
            labels.append(is_solution(answer.group(1), numbers, target))
            left = None
        else:
            left = _after(line, left)
            if left is not None and not is_reachable(left, target):
                left = None
            labels.append(left is not None)
    return labels


def _after(line: str, left: Sequence[Fraction]) -> list[Fraction] | None:
    """The numbers left after a line; None where it is not a step, uses what is not there, or is wrong."""
    step = _STEP.fullmatch(line)
    if step is None:
        return None
    try:
        a, b, result = Fraction(step.group(1)), Fraction(step.group(3)), Fraction(step.group(4))
        said = Counter(Fraction(n) for n in step.group(5).split(" "))
    except (ZeroDivisionError, ValueError):  # a number such as 1/0, or one with more digits than Python reads
        return None
    there, used = Counter(left), Counter([a, b])
    if used - there or apply(step.group(2), a, b) != result:
        return None
    after = there - used + Counter([result])
    return list(after.elements()) if said == after else None
