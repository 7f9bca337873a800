"""The 25 constraint types of IFEval's prompts (arXiv 2311.07911) as predicates: (text, arguments) -> bool.

Names, arguments and verdicts are the published ones, oddities included where a model could meet them (each is said below), except:
keywords are literal text here, not regular expressions; sentences and words in capitals are counted by rules, not by Punkt's model; the
language is told with a fixed seed, and of text in capitals by its small letters (``constraints_text.language`` says why); and every
predicate takes time linear in the text, whatever the text.
No predicate raises on any string. Texts that are blank never get here: ``constraints.Rule`` refuses them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from . import constraints_text as count

LESS, AT_LEAST = "less than", "at least"
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_STAR_BULLET = re.compile(r"^[^\S\n]*\*[^*].*$", re.MULTILINE)  # "**bold" is none; a lone star takes the next line with it
_DASH_BULLET = re.compile(r"^[^\S\n]*-.*$", re.MULTILINE)  # any line that begins with a dash, a divider too
_HIGHLIGHT = re.compile(r"\*[^\n*]*\*")
_DOUBLE_HIGHLIGHT = re.compile(r"\*\*[^\n*]*\*\*")
_DIVIDER = re.compile(r"\s?\*\*\*\s?")
_FENCES = ("```json", "```Json", "```JSON", "```")
_POSTSCRIPTS = {"P.S.": re.compile(r"p\.\s?s\."), "P.P.S": re.compile(r"p\.\s?p\.\s?s")}


def compare(number: int, relation: str, threshold: int) -> bool:
    return number < threshold if relation == LESS else number >= threshold


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return compare(count.capital_words(text), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    """Capitals, and English by its small letters, where the published rule shows the detector the capitals."""
    return text.isupper() and count.language(text) in ("en", None)


def english_lowercase(text: str) -> bool:
    return text.islower() and count.language(text) in ("en", None)


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def two_responses(text: str) -> bool:
    """Two different texts round six stars; a separator at either end is allowed, an empty part between two is not."""
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False
    answers = [part for part in parts if part]
    return len(answers) == 2 and answers[0] != answers[1]


def number_placeholders(text: str, num_placeholders: int) -> bool:
    found = 0
    for line in text.split("\n"):
        start = line.find("[")
        while start >= 0 and (end := line.find("]", start)) >= 0:
            found, start = found + 1, line.find("[", end)
    return found >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """The marker somewhere in the text, in any case: the published rule does not ask for the end either."""
    text, marker = text.lower(), postscript_marker.strip()
    return bool(_POSTSCRIPTS[marker].search(text)) if marker in _POSTSCRIPTS else marker.lower() in text


def constrained_response(text: str) -> bool:
    return any(option in text for option in OPTIONS)


def json_format(text: str) -> bool:
    """One JSON value, in a Markdown fence or not."""
    text = text.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many marks like "Section 3", anywhere."""
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", text)) >= num_sections


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    return len(_STAR_BULLET.findall(text)) + len(_DASH_BULLET.findall(text)) == num_bullets


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """*such* spans that are not blank; **such** ones are looked for apart and added."""
    single = sum(bool(span.strip("*").strip()) for span in _HIGHLIGHT.findall(text))
    double = sum(bool(span[2:-2].strip()) for span in _DOUBLE_HIGHLIGHT.findall(text))
    return single + double >= num_highlights


def title(text: str) -> bool:
    """A line with <<something>>."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def existence(text: str, keywords: tuple[str, ...]) -> bool:
    """Each keyword somewhere, in any case, also inside a longer word."""
    return all(re.search(re.escape(keyword), text, re.IGNORECASE) for keyword in keywords)


def forbidden_words(text: str, forbidden_words: tuple[str, ...]) -> bool:
    """None of them as a word of its own, in any case."""
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return compare(len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE)), relation, frequency)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, language: str) -> bool:
    """Text in which no language can be told (digits, marks) passes, as published."""
    return count.language(text) in (language, None)


def nth_paragraph_first_word(text: str, first_word: str, num_paragraphs: int, nth_paragraph: int) -> bool:
    """Paragraphs are split at every blank line. Blank ones do not count, but they do when the n-th is looked up, as published."""
    paragraphs = text.split("\n\n")
    written = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    chosen = paragraphs[nth_paragraph - 1].split() if 0 < nth_paragraph <= written else []
    if not chosen or written != num_paragraphs:
        return False
    word = chosen[0].lstrip("'").lstrip('"').lower()
    return re.split(r"[.,?!'\"]", word, maxsplit=1)[0] == first_word.lower()


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Parts between *** dividers; a divider at either end makes no part, an empty part between two is refused."""
    parts = [part.strip() for part in _DIVIDER.split(text)]
    if not all(parts[1:-1]):
        return False
    return sum(map(bool, parts)) == num_paragraphs


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return compare(count.sentences(text), relation, num_sentences)


def number_words(text: str, num_words: int, relation: str) -> bool:
    return compare(count.words(text), relation, num_words)


def no_comma(text: str) -> bool:
    return "," not in text


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# Arguments and their kinds, as ``constraints`` checks them.
RULES: dict[str, tuple[Callable[..., bool], dict[str, str]]] = {
    "change_case:capital_word_frequency": (capital_word_frequency, {"capital_frequency": "count", "capital_relation": "relation"}),
    "change_case:english_capital": (english_capital, {}),
    "change_case:english_lowercase": (english_lowercase, {}),
    "combination:repeat_prompt": (repeat_prompt, {"prompt_to_repeat": "text"}),
    "combination:two_responses": (two_responses, {}),
    "detectable_content:number_placeholders": (number_placeholders, {"num_placeholders": "count"}),
    "detectable_content:postscript": (postscript, {"postscript_marker": "text"}),
    "detectable_format:constrained_response": (constrained_response, {}),
    "detectable_format:json_format": (json_format, {}),
    "detectable_format:multiple_sections": (multiple_sections, {"section_spliter": "text", "num_sections": "count"}),
    "detectable_format:number_bullet_lists": (number_bullet_lists, {"num_bullets": "count"}),
    "detectable_format:number_highlighted_sections": (number_highlighted_sections, {"num_highlights": "count"}),
    "detectable_format:title": (title, {}),
    "keywords:existence": (existence, {"keywords": "words"}),
    "keywords:forbidden_words": (forbidden_words, {"forbidden_words": "words"}),
    "keywords:frequency": (frequency, {"keyword": "text", "frequency": "count", "relation": "relation"}),
    "keywords:letter_frequency": (letter_frequency, {"letter": "letter", "let_frequency": "count", "let_relation": "relation"}),
    "language:response_language": (response_language, {"language": "language"}),
    "length_constraints:nth_paragraph_first_word": (
        nth_paragraph_first_word,
        {"first_word": "text", "num_paragraphs": "count", "nth_paragraph": "count"},
    ),
    "length_constraints:number_paragraphs": (number_paragraphs, {"num_paragraphs": "count"}),
    "length_constraints:number_sentences": (number_sentences, {"num_sentences": "count", "relation": "relation"}),
    "length_constraints:number_words": (number_words, {"num_words": "count", "relation": "relation"}),
    "punctuation:no_comma": (no_comma, {}),
    "startend:end_checker": (end_checker, {"end_phrase": "text"}),
    "startend:quotation": (quotation, {}),
}
