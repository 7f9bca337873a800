import json

import pytest

from a1jax import metrics
from a1jax.analysis import findings, plots, report


def score(wins, n):
    return {"success": wins / n, "low": 0.1, "high": 0.9, "n": n, "by_steps": {"1": [wins, n]}, "statuses": {}, "tokens": 1.0, "turns": 1.0}


@pytest.fixture()
def results():
    names = {"base": 0, "sft": 5, "sft_continued": 6, "teacher_search": 9, "teacher_tool_calling": 9, "student": 9}
    scores = {name: {d: score(wins, 10) for d in ("search", "tool_calling")} for name, wins in names.items()}
    row = {"base": 0.0, "sft": 0.5, "sft_continued": 0.6, "teacher": 0.9, "student": 0.9, "n": 10}
    return {
        "domains": {"search": {**row, "taught_by": "teacher_search"}, "tool_calling": {**row, "taught_by": "sft"}},
        "wall_seconds": 12.0,
        "scores": scores,
        "stages": {"sft": {"steps": 3, "seconds": 1.0}},
        "parameters": {"total": 10, "active": 5},
        "seed": 0,
    }


def test_table_has_a_row_per_domain_and_length(results):
    rows = report.rows(results)
    assert rows[0] == ["domain", "n", "base", "sft", "sft_continued", "teacher_search", "teacher_tool_calling", "student"]
    assert rows[1][:4] == ["search", "10", "0.0 [10-90]", "50.0 [10-90]"] and rows[2][0] == "  1 step" and rows[2][-1] == "90"
    assert len(rows) == 5


def test_findings_say_what_was_missed(results):
    assert all(line.startswith("[met]") for line in report.findings(results))
    for key, value, words in (
        ("student", 0.5, "90 % of its teachers"),
        ("sft", 0.2, "SFT beats base"),
        ("teacher", 0.5, "teacher beats SFT"),
    ):
        worse = json.loads(json.dumps(results))
        for row in worse["domains"].values():
            row[key] = value
        assert any(line.startswith("[MISSED]") and words in line for line in report.findings(worse)), words
    assert any("not admitted" in line for line in report.findings(results))


def test_a_runs_own_findings_win(results):
    assert report.findings({**results, "findings": ["[met] ours"]}) == ["[met] ours"]
    assert "[met] ours" in report.table({**results, "findings": ["[met] ours"]})


def test_six_domains_findings_say_what_was_missed(results):
    lines = findings.six_domains(results)
    assert all(line.startswith("[met]") for line in lines) and len(lines) == 6
    for row in results["domains"].values():
        row["student"] = 0.86  # 95 % of 0.9 is 0.855
    assert all(line.startswith("[met]") for line in findings.six_domains(results))
    assert sum(line.startswith("[MISSED]") for line in findings.six_domains(results, share=0.96)) == 1
    results["domains"]["search"]["student"] = 0.4
    missed = [line for line in findings.six_domains(results) if line.startswith("[MISSED]")]
    assert len(missed) == 2 and "63.0 of 90.0 (70 %)" in missed[0] and "search: the student is not below SFT: 50.0 -> 40.0" in missed[1]


def test_with_many_domains_there_is_one_column_for_each_ones_own_teacher(results):
    results["domains"]["science"] = results["domains"]["search"]
    for model in results["scores"].values():
        model["science"] = score(1, 10)
    results["scores"]["teacher_science"] = {"science": score(7, 10)}
    rows = report.rows(results)
    assert rows[0][2:] == ["base", "sft", "sft_continued", "teacher", "student"]
    assert [row[5] for row in rows[1::2]] == ["90.0 [10-90]", "90.0 [10-90]", "70.0 [10-90]"]


def test_report_and_picture_come_from_what_the_run_wrote(results, tmp_path):
    with metrics.Writer(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, "sft", {"ce": 2.0 / step})
            writer.write(step, "distill", {"distill/kl": 0.2, "distill/coverage": 0.9, "rollout/success/search": 0.5})
    assert plots.series(metrics.read(tmp_path), "sft", "ce") == ([1, 2], [2.0, 1.0])
    report.write(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "90.0" in (tmp_path / "report.md").read_text() and (tmp_path / "curves.png").stat().st_size > 20_000
    assert (tmp_path / "report.html").is_file() and not list(tmp_path.glob("*.part"))
