"""Steps as token spans: cut where vLLM would cut, whole however they are cut, never a step of nothing."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.config import parse_config
from reasoner_ray.errors import ConfigError
from reasoner_ray.steps import Partial, Separator, StepsBy, before, decode_piece, read_cut, segment
from tests.conftest import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    return [int(t) for t in TOKENIZER.encode(text)]


def texts(tokens: list[int], ends: list[int], start: int = 0) -> list[str]:
    return [TOKENIZER.decode(tokens[a:b]) for a, b in zip([start, *ends], ends, strict=False)]


def test_a_step_ends_with_the_token_that_completes_the_separator() -> None:
    prompt, solution = ids("user: what?\n"), ids("one\ntwo 3\nfour")
    tokens = prompt + solution
    ends = segment(tokens, TOKENIZER, "\n", len(prompt))
    assert texts(tokens, ends, len(prompt)) == ["one\n", "two 3\n", "four"]
    assert ends[-1] == len(tokens)


def test_a_separator_of_several_tokens_and_one_inside_a_token() -> None:
    tokens = ids("a is. So b is. So c")
    for end in segment(tokens, TOKENIZER, ". So")[:-1]:
        assert ". So" in TOKENIZER.decode(tokens[:end]) and not TOKENIZER.decode(tokens[: end - 1]).endswith(". So")
    number, word = ids("1")[0], next(t for t in range(len(TOKENIZER)) if re.fullmatch("[a-z]z?[a-z]{2}", TOKENIZER.decode([t])))
    inside = TOKENIZER.decode([word])[1]
    assert segment([number, word, number], TOKENIZER, inside) == [2, 3], "the token that completes it belongs to the step, whole"


def test_an_end_of_text_after_a_separator_is_no_step() -> None:
    tokens = [*ids("a\nb\n"), EOS]
    assert texts(tokens, segment(tokens, TOKENIZER, "\n")) == ["a\n", "b\n" + TOKENIZER.eos_token]
    assert segment([EOS], TOKENIZER, "\n") == [1]
    assert segment([], TOKENIZER, "\n") == segment([], TOKENIZER, 3) == segment([], TOKENIZER, before("x")) == []
    assert segment([5, 6], TOKENIZER, "\n", 2) == []


def test_steps_by_number_of_tokens() -> None:
    assert segment(list(range(10, 20)), TOKENIZER, 4, start=1) == [5, 9, 10]
    assert segment(list(range(10, 18)), TOKENIZER, 4) == [4, 8]
    with pytest.raises(ValueError, match="at least one token"):
        segment([1], TOKENIZER, 0)
    with pytest.raises(ValueError, match="at least one character"):
        Separator(TOKENIZER, "")


def test_steps_by_structure() -> None:
    tokens = ids(" Step 1: add. Step 2: multiply. Step 10: stop.")
    ends = segment(tokens, TOKENIZER, before(r"Step \d+:"))
    assert [t.strip() for t in texts(tokens, ends)] == ["Step 1: add.", "Step 2: multiply.", "Step 10: stop."]
    assert segment(tokens, TOKENIZER, lambda text: [10**6]) == [len(tokens)], "an offset past the end is the end"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab1 \né🙂.", max_size=8), max_size=6), st.text("xy \n", max_size=4), st.booleans())
def test_steps_cover_the_solution_and_split_as_often_as_the_text(parts: list[str], prompt: str, eos: bool) -> None:
    start = len(ids(prompt))
    tokens = ids(prompt) + ids("\n".join(parts)) + [EOS] * eos
    ends = segment(tokens, TOKENIZER, "\n", start)
    assert ends == sorted(set(ends)) and all(end > start for end in ends)
    assert not ends or ends[-1] == len(tokens)
    partial = Partial(tuple(tokens), tuple(ends), start)
    assert tuple(t for step in partial.steps for t in step) == partial.solution
    for a, b in zip([start, *ends], ends, strict=False):
        assert decode_piece(TOKENIZER, tokens, a, b - 1).count("\n") == 0 or tokens[b - 1] == EOS, "no step goes on past its separator"


def test_growing_a_partial_solution_is_cutting_the_whole() -> None:
    prompt, first, second = ids("p:\n"), ids("a\n"), ids("b\n")
    grown = Partial.root(prompt).then(first).then(second).then([EOS], joined=True)
    tokens = [*prompt, *first, *second, EOS]
    assert grown == Partial(tuple(tokens), tuple(segment(tokens, TOKENIZER, "\n", len(prompt))), len(prompt))
    assert grown.until(1) == Partial.root(prompt).then(first)
    assert grown.until(0) == Partial.root(prompt)
    assert (grown.prompt, grown.steps[0]) == (tuple(prompt), tuple(first))


@pytest.mark.parametrize(("ends", "start"), [((2,), 1), ((3, 3), 1), ((), 2), ((1, 3), 1), ((3,), -1)])
def test_steps_that_do_not_cover_the_solution_are_refused(ends: tuple[int, ...], start: int) -> None:
    with pytest.raises(ValueError, match="do not cover"):
        Partial((7, 8, 9), ends, start)


def sentences(text: str) -> list[int]:
    return [m.end() for m in re.finditer(r"\. ", text)]


def backwards(text: str) -> list[int]:
    return [3, 1]


def breaks(text: str) -> list[int]:
    raise KeyError("no")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (StepsBy(before=r"Step \d+:"), ["It is so. ", "Step 1: a. b\n", "Step 2: c"]),
        (StepsBy(function="tests.test_steps:sentences"), ["It is so. ", "Step 1: a. ", "b\nStep 2: c"]),
        ("\n", ["It is so. Step 1: a. b\n", "Step 2: c"]),
    ],
)
def test_steps_as_a_job_names_them(setting: StepsBy | str, expected: list[str]) -> None:
    tokens = [t for piece in ("It is so.", " ", "Step 1: a.", " ", "b\n", "Step 2: c") for t in ids(piece)]
    assert texts(tokens, segment(tokens, TOKENIZER, read_cut(setting))) == expected


def test_steps_by_structure_in_all_sections_of_a_job() -> None:
    tree = {"before": "Step [0-9]+:"}
    config = parse_config(
        {"search": {"separator": tree}, "labels": {"separator": tree}, "scoring": {"process": {"separator": tree, "args": {"model": "m"}}}}
    )
    process = config.scoring.process
    assert process is not None
    assert config.search.separator == config.labels.separator == process.separator == StepsBy(before="Step [0-9]+:")
    assert parse_config(config.model_dump(mode="json")) == config, "as the run's own config.yaml has it"


@pytest.mark.parametrize("section", ["search", "labels"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"before": "("}, "no regular expression"),
        ({"before": "x", "function": "a:b"}, "one of `before`"),
        ({}, "one of `before`"),
        ({"function": "tests.test_steps:nothing"}, r"separator\.function: module 'tests.test_steps' has no 'nothing'"),
        (0, r"separator: must be a text that ends a step"),
        ("", r"separator: must be a text that ends a step"),
    ],
)
def test_separators_that_cannot_be_are_refused(section: str, setting: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({section: {"separator": setting}})


def test_what_a_users_function_answers_amiss_is_an_error() -> None:
    for name, why in (("backwards", "ascending places"), ("breaks", "raised KeyError")):
        with pytest.raises(ConfigError, match=why):
            segment(ids("abcdef"), TOKENIZER, read_cut(StepsBy(function=f"tests.test_steps:{name}")))
