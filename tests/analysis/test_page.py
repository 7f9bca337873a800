import csv
import math

import pytest

from a1jax import metrics, provenance
from a1jax.analysis import behaviour, drawing, figures, page
from a1jax.analysis.figures import Bars, Figure, Line, Panel, Rate
from a1jax.config import ConfigError
from a1jax.main import main
from a1jax.stages.evaluate import wilson
from tests.analysis.made_up_run import SCORES, fill, score


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_models_of_a_domain_are_its_own_in_the_tables_order():
    assert behaviour.models_of(SCORES, "search") == ["base", "teacher_search", "student"]
    assert behaviour.models_of(SCORES, "tool_calling") == ["base", "teacher_tool_calling"]


def test_by_domain_has_each_domains_own_teacher_beside_its_student_with_intervals():
    (panel,) = behaviour.by_domain(SCORES).panels
    assert panel.labels == ("search", "tool_calling") and list(panel.parts) == ["base", "teacher", "student"]
    assert panel.parts["teacher"] == (Rate(0.8, *wilson(8, 10), 10), Rate(1.0, *wilson(8, 8), 8))
    assert panel.parts["student"] == (Rate(0.9, *wilson(9, 10), 10), None) and panel.title == "n = 8 to 10 runs a bar"
    assert behaviour.by_domain({"base": {"search": {**score(0, 1), "n": 0}}}).panels[0].parts == {"base": (None,)}


def test_by_length_shows_shares_with_their_intervals_in_the_order_of_lengths():
    figure = behaviour.by_length(SCORES)
    base, teacher, student = figure.panels[0].lines
    assert (teacher.label, student.label, student.x, student.y) == ("teacher", "student", (1, 2), (0.9, 0.0))
    assert (student.low[0], student.high[0]) == wilson(9, 10) and figure.panels[0].title == "search (n = 10)"


def test_statuses_and_stops_are_shares_of_all_runs():
    bars = behaviour.statuses(SCORES).panels[0]
    assert bars.labels == ("base", "teacher", "student") and bars.parts["FINISHED"] == (0.0, 0.8, 0.9)
    assert all(math.isclose(sum(values[i] for values in bars.parts.values()), 1.0) for i in range(3))
    (stops,) = behaviour.stops(SCORES).panels  # models judged before it was counted are left out
    assert stops.labels == ("student",)
    assert stops.parts == {"early": (0.1,), "in_time": (0.7,), "late": (0.0,), "never": (0.0,), "untold": (0.2,)}
    assert {*stops.parts, *bars.parts} <= set(drawing.FILLS)


def test_curves_are_grouped_by_stage_and_meaning_and_leave_out_what_is_not_finite(tmp_path):
    lines = metrics.read(fill(tmp_path))
    grpo, distill = behaviour.curves(lines)
    assert [p.title for p in grpo.panels] == ["Reward and its parts", "Divergence"] and grpo.name == "stage_t_grpo"
    assert [(c.label, c.x) for c in grpo.panels[0].lines] == [("grpo/reward", (1, 2, 3)), ("format", (1, 2, 3))]
    coverage = next(p for p in distill.panels if p.title.startswith("Coverage")).lines[0]
    assert (coverage.x, coverage.y) == ((1, 3), (0.9, 0.9))
    assert [c.label for c in behaviour.losses(lines).panels[0].lines] == ["sft"]


def test_csv_holds_the_numbers_of_the_figure_unrounded():
    line = Line("a", (1, 2), (1 / 3, 2 / 3), (0.1, 0.2), (0.5, 0.9))
    figure = Figure("f", "F", "", (Panel("p", "x", "y", (line,)), Bars("b", "y", ("m", "n"), {"FAILED": (0.25, 1.0)})))
    found = list(csv.DictReader(figures.to_csv(figures.rows(figure)).splitlines()))
    assert [(r["panel"], r["series"], r["x"], float(r["value"]), r["low"]) for r in found] == [
        ("p", "a", "1", 1 / 3, "0.1"),
        ("p", "a", "2", 2 / 3, "0.2"),
        ("b", "FAILED", "m", 0.25, ""),
        ("b", "FAILED", "n", 1.0, ""),
    ]
    assert drawing.draw(figure) == drawing.draw(figure) and figures.to_csv([]).startswith("panel,")


def test_the_page_of_a_running_run_says_what_there_is(tmp_path, read_page):
    folder = fill(tmp_path, stage="<b>&sft")
    text = page.write(folder).read_text()
    found = read_page(text)
    assert "a1jax run x.py" in found.text and "running, started" in found.text and "90.0" in found.text and "b" not in found.tags
    assert found.tags.count("img") == 8 and "What it set out" not in found.text
    named = [a for a in found.addresses if a.endswith(".csv")]
    assert len(named) == 10 and all((folder / a).is_file() for a in named)
    drawn = {f.name: f for f in behaviour.figures(SCORES, metrics.read(folder))}
    for name, figure in drawn.items():
        want = [(r["panel"], r["series"], str(r["x"]), r["value"]) for r in figures.rows(figure)]
        got = [(r["panel"], r["series"], r["x"], float(r["value"])) for r in read_csv(folder / f"report/{name}.csv")]
        assert sorted(got) == sorted(want) and got
    row = next(r for r in read_csv(folder / "report/behaviour.csv") if r["model"] == "student")
    assert (row["tokens"], row["tool_errors"], row["FINISHED"], row["early"], row["late"]) == ("50.5", "0.25", "9", "1", "0")
    assert row["untold"] == "2" and "untold" in found.text
    assert not list(folder.rglob("*.part"))
    ended = read_page(page.write(folder, devices="3 x abacus").read_text()).text
    assert "3 x abacus" in ended and "finished, started" in ended


def test_a_run_that_has_hardly_begun_has_a_page_and_no_run_has_none(tmp_path, read_page, capsys):
    provenance.start(tmp_path, provenance.collect(["run", "x.py"], None))
    assert main(["report", str(tmp_path)]) == 0 and f"{tmp_path}: no model has been judged yet" in capsys.readouterr().out
    assert "No model has been judged yet" in read_page(page.write(tmp_path).read_text()).text
    with pytest.raises(ConfigError, match="no run"):
        page.write(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
