"""Judges: who says whether an answer is right, or which rubrics a run met.

A judge is a function ``Case -> Verdict``. Those here are rules: pure, offline, exact. ``remote_judge.RemoteJudge`` asks an
OpenAI-compatible endpoint, for those who have one; nothing needs it. Tasks have verifiers of their own: a judge decides in their place
where a config names one (``GrpoConfig.judge``, ``Evaluation.judge``).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..config import Binding, ConfigError
from .rewards import rubric_fraction


class JudgeError(ConfigError):
    """A judge that gave no verdict. The message is one line: which endpoint, what it said, what to do."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is judged. expected: the reference answer, "" for none. rubrics: what to look for, one verdict each; () stands for the
    one rubric "says the same as the reference answer"."""

    question: str
    answer: str
    expected: str = ""
    rubrics: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """met: one bool per rubric of the case, at least one. reason: one line for people to read."""

    met: tuple[bool, ...]
    reason: str

    @property
    def score(self) -> float:
        """The share of rubrics met, in [0, 1]; with a single rubric 0.0 or 1.0."""
        return rubric_fraction(self.met)


Judge = Callable[[Case], Verdict]


def opened(judge: Binding) -> Judge:
    """The judge a config names: a class, as ``RemoteJudge``, is made of what is bound, a function judges as it is bound.

    Raises ConfigError for one that needs more than is bound, or refuses it."""
    try:
        if isinstance(judge.fn, type):
            return judge()
        inspect.signature(judge.fn).bind(None, **judge.kwargs)
        return judge
    except TypeError as error:
        raise ConfigError(f"judge: bind what {judge.fn.__name__} needs: {error}") from None


def judge_all(judge: Judge, cases: Sequence[Case], workers: int = 8) -> list[Verdict]:
    """The verdict of every case, in their order; equal cases are asked once, ``workers`` at a time. Raises what the judge raises."""
    if workers < 1:
        raise ConfigError(f"judge_all: workers is {workers}; it must be at least 1")
    once = list(dict.fromkeys(cases))
    pool = ThreadPoolExecutor(workers, "judge")
    try:
        running = [pool.submit(judge, case) for case in once]
        verdicts = {case: one.result() for case, one in zip(once, running, strict=True)}
    finally:  # an endpoint that is down is not asked for every case, and who is told to stop does not wait for its retries
        pool.shutdown(wait=False, cancel_futures=True)
    return [verdicts[case] for case in cases]


# A sign only where no word ends before it; nothing out of a fraction, a version or a name: 1/2, 1.5.2, covid-19's own sign, v2.
_NUMBER = r"(?:(?<![\w.])[-+])?(?<![\w./])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w/]|\.\d|,\d{3})"
_TOKENS = re.compile(rf"{_NUMBER}|\w+|[^\w\s]")
_CHOICE = re.compile(r"\b[Aa]nswer(?:\s+is|\s*:)?\s*[(\[*]*([A-Z])\b(?!['’])")
ARTICLES = ("a", "an", "the")


def plain_tokens(text: str) -> tuple[str, ...]:
    """Words, numbers and symbols of a text, without case, punctuation and articles before a word.

    Numbers keep sign and decimals and lose thousands commas; + % $ # / and other symbols stay, so that C++ is not C and 5 % is not 5.
    """
    found = [token.casefold() for token in _TOKENS.findall(_plain(text))]
    words = [not _punctuation(token) for token in found]
    kept = []
    for at, token in enumerate(found):
        article = token in ARTICLES and at + 1 < len(found) and words[at + 1]
        if words[at] and not article:
            kept.append(token.replace(",", "").lstrip("+") or token)
    return tuple(kept)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-")  # U+2212, the typographer's minus


def _punctuation(token: str) -> bool:
    kind = unicodedata.category(token) if len(token) == 1 else ""
    return kind == "Sk" or (kind.startswith("P") and token not in "%#&@/")


def exact_match(case: Case) -> Verdict:
    """Met if answer and reference are the same up to case, spacing, punctuation and articles; an empty answer never is."""
    answer, expected = plain_tokens(case.answer), plain_tokens(case.expected)
    if not answer or not expected:  # nothing but punctuation, or only an article: then to the letter
        answer, expected = tuple(case.answer.split()), tuple(case.expected.split())
    return _single(bool(answer) and answer == expected, "same text", "another text")


def number_match(case: Case, relative: float = 1e-6, absolute: float = 1e-9) -> Verdict:
    """Met if the last number of the answer is the last number of the reference, within the larger of both tolerances.

    The last one, because answers end with their result, as GSM8K's "#### 42". Raises ConfigError for a reference without a number.
    """
    answer, expected = last_number(case.answer), last_number(case.expected)
    if expected is None:
        raise ConfigError(f"number_match: the reference answer {case.expected[:60]!r} has no number")
    if answer is None:
        return Verdict((False,), "no number in the answer")
    close = abs(answer - expected) <= max(absolute, relative * abs(expected))
    return _single(close, f"{answer:g} is {expected:g}", f"{answer:g} is not {expected:g}")


def last_number(text: str) -> float | None:
    """The last finite decimal number in a text, thousands commas allowed, or None."""
    numbers = [float(one.replace(",", "")) for one in re.findall(_NUMBER, _plain(text))]
    return next((x for x in reversed(numbers) if abs(x) < float("inf")), None)


def choice_match(case: Case) -> Verdict:
    """Met if the answer names the letter of the reference and no other: "C", "(c)", "C) because ...", "the answer is C".

    Raises ConfigError for a reference that is not one letter.
    """
    wanted = case.expected.strip(" ().:").upper()
    if not re.fullmatch("[A-Z]", wanted):
        raise ConfigError(f"choice_match: the reference answer {case.expected[:60]!r} is not one letter")
    alone = re.match(r"\W*([A-Za-z])(?:\W*$|[).:]\s)", case.answer)
    letters = sorted({*_CHOICE.findall(case.answer), *(alone[1].upper() if alone else "")})
    if len(letters) != 1:
        return Verdict((False,), f"several letters: {', '.join(letters)}" if letters else "no letter")
    return _single(letters == [wanted], "same letter", f"{letters[0]} is not {wanted}")


def by_rules(case: Case, rules: Mapping[str, Callable[[Case], bool]]) -> Verdict:
    """Each rubric of the case by the rule of its name. Raises ConfigError for a rubric without a rule and a case without rubrics."""
    missing = [rubric for rubric in case.rubrics if rubric not in rules]
    if missing or not case.rubrics:
        raise ConfigError(f"by_rules: no rule for rubric {missing[0]!r}" if missing else "by_rules: the case has no rubrics")
    met = tuple(bool(rules[rubric](case)) for rubric in case.rubrics)
    failed = [rubric for rubric, one in zip(case.rubrics, met, strict=True) if not one]
    return Verdict(met, f"not met: {', '.join(failed)}" if failed else "all met")


def _single(met: bool, yes: str, no: str) -> Verdict:
    return Verdict((met,), yes if met else no)
