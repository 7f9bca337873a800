"""What a run set out to make true, as lines that say what was measured, met or not: functions of results.json."""

from __future__ import annotations

from typing import Any


def _line(met: bool, text: str) -> str:
    return f"[{'met' if met else 'MISSED'}] {text}"


def _mean(results: dict[str, Any], column: str) -> float:
    rows = results["domains"].values()
    return sum(r[column] for r in rows) / len(rows)


def _beats_sft(domain: str, r: dict[str, Any]) -> str:
    held = "" if r["taught_by"] != "sft" else " (not admitted; the SFT model held its place)"
    text = f"{domain}: the teacher beats SFT on its own domain: {100 * r['sft']:.1f} -> {100 * r['teacher']:.1f}{held}"
    return _line(r["teacher"] > r["sft"], text)


def _keeps_up(results: dict[str, Any], share: float, words: str) -> str:
    teachers, student = _mean(results, "teacher"), _mean(results, "student")
    text = f"{words}: {100 * student:.1f} of {100 * teachers:.1f} ({100 * student / max(teachers, 1e-9):.0f} %)"
    return _line(student >= share * teachers > 0, text)


def _against_control(results: dict[str, Any], words: str) -> str:
    student, control = _mean(results, "student"), _mean(results, "sft_continued")
    return _line(student >= control, f"{words}: {100 * student:.1f} against {100 * control:.1f}")


def quickstart(results: dict[str, Any]) -> list[str]:
    """SFT beats base by 30 points, each teacher SFT; the student has 90 % of its teachers' mean and no less than SFT continued."""
    out = []
    for d, r in results["domains"].items():
        out.append(_line(r["sft"] - r["base"] >= 0.30, f"{d}: SFT beats base by 30 points: {100 * r['base']:.1f} -> {100 * r['sft']:.1f}"))
        out.append(_beats_sft(d, r))
    out.append(_keeps_up(results, 0.9, "one student reaches 90 % of its teachers' mean"))
    return [*out, _against_control(results, "and is no worse than SFT continued at the same compute")]


def six_domains(results: dict[str, Any], share: float = 0.95) -> list[str]:
    """Each teacher beats SFT on its own domain; the student has ``share`` of the teachers' mean, is below SFT on no domain, and on average
    not below SFT continued."""
    out = [_beats_sft(d, r) for d, r in results["domains"].items()]
    out.append(_keeps_up(results, share, f"the student reaches {100 * share:.0f} % of its teachers' mean over domains"))
    for d, r in results["domains"].items():
        text = f"{d}: the student is not below SFT: {100 * r['sft']:.1f} -> {100 * r['student']:.1f} (n = {r['n']})"
        out.append(_line(r["student"] >= r["sft"], text))
    return [*out, _against_control(results, "the student is no worse than SFT continued at the same compute, mean over domains")]
