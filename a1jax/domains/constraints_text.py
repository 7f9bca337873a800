"""What the constraint rules count in a text: words, sentences, words in capitals, and the language it is written in.

Words are runs of word characters. Sentences and capitals follow the conventions of the tools that IFEval (arXiv 2311.07911) counts
with, Punkt (Kiss and Strunk, 2006) and the Treebank word splitter, as rules: neither needs a model file here.
"""

from __future__ import annotations

import functools
import re

_WORD = re.compile(r"\w+")
_RUN = re.compile(r"\S+")
_INNER_END = re.compile(r"\S*[.?!](?=[)\"'\]}>*:;@({\[])")  # a run up to its last . ? or ! that a mark follows
_LAST_END = re.compile(r"\S*[.?!](?=[)\"'\]}>*:;@({\[]|$)")  # ... or the end of the run, where another run follows
# Words before a period that do not end a sentence by themselves: the common English ones among those that Punkt's model knows.
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof gen col lt sen rep messrs st ave ft jr sr inc ltd corp co cos bros vs jan feb aug sep sept oct nov dec tues wed "
    "fri u.s u.k u.n d.c l.a n.y a.m p.m ph.d a.d u.s.a calif conn ill fla ga pa va wis minn mich wash colo ariz ala maj v".split()
)
# After an abbreviation one of these, with a capital, begins a new sentence.
_STARTERS = frozenset(
    "the a an this that these those he she it they we you his her its their our your but and so then there if when while as at in on for "
    "however although since after before what why how some many most all no".split()
)
_CLOSING = re.compile(r"(?:[)\"'\]}]+(?:\s+|$))?")  # marks that still belong to the sentence they close


def words(text: str) -> int:
    """Number of runs of letters, digits and underscores: "don't stop" has three."""
    return len(_WORD.findall(text))


def sentences(text: str) -> int:
    """Number of sentences; what follows the last end counts as one where it holds more than closing marks. "" has none."""
    count, last = 0, 0
    runs = list(_RUN.finditer(text))
    for match, following in zip(runs, [*(run[0] for run in runs[1:]), None], strict=False):
        end = (_INNER_END if following is None else _LAST_END).match(match[0])
        if end is None:
            continue
        at_end = end.end() == len(match[0])
        if _ends(end[0], following if at_end else None):
            count, last = count + 1, _CLOSING.match(text, match.start() + end.end()).end()
    return count + bool(text[last:].strip())


def _ends(word: str, following: str | None) -> bool:
    """Whether a word that closes with . ? or ! ends its sentence, given the word after it (None: a mark, or nothing, follows)."""
    if word[-1] != ".":
        return True
    stem = word.rstrip(".").lstrip("(\"'[{*").lower()
    capital = following is not None and following[0].isupper()
    starter = capital and following.strip(".,;:!?\"'()*").lower() in _STARTERS
    if word.endswith(".."):
        return starter
    if stem in _ABBREVIATIONS:
        return starter
    if len(stem) == 1 and stem.isalpha():
        return False  # an initial
    if stem and stem.replace(",", "").replace(".", "").replace("-", "").isdigit():
        return following is None or not following[0].islower()  # "2. Then" is an item and "2. then" an ordinal
    return True


# A token that Treebank keeps together: no blanks, brackets, quotes or . ? ! ; at its end; contractions are two tokens (I'M: I and 'M).
_TOKEN = re.compile(r"[^\s\"()\[\]{}<>?!;@#$%&,:“”«»`–—]+")
_CONTRACTION = re.compile(r"(?i)(?<=.)('(?:s|m|d|ll|re|ve)|n't)$")


def capital_words(text: str) -> int:
    """Number of words all of whose letters are capitals: "A NASA-led U.S. plan" has two (A and U.S.), "I'M" counts as two."""
    count = 0
    for token in _TOKEN.findall(text):
        for part in token.split("--"):
            part = part.strip("'")
            count += sum(piece.isupper() for piece in _CONTRACTION.split(part))
    return count


@functools.lru_cache(maxsize=1)
def _detectors():
    from langdetect import detector_factory

    detectors = detector_factory.DetectorFactory()
    detectors.load_profile(detector_factory.PROFILES_DIRECTORY)
    detectors.seed = 0  # of this object alone: langdetect draws at random, and a verdict must not depend on the run
    return detectors


@functools.lru_cache(maxsize=1024)
def language(text: str) -> str | None:
    """ISO 639-1 code of the likeliest language (zh-cn and zh-tw for Chinese), None where the text has no letters to tell it by.

    langdetect's naive Bayes over letter n-grams, as IFEval uses it, but seeded. Text without small letters is folded first, which IFEval
    does not do: the detector skips words in capitals and judges by what little is left, so that plain English in capitals passes for
    German or Vietnamese.
    """
    from langdetect import LangDetectException

    detector = _detectors().create()
    try:
        detector.append(text.lower() if text.isupper() else text)
        return detector.detect()
    except LangDetectException:
        return None
