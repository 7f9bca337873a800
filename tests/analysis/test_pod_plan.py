"""Reports of `a1jax compile`, made up here: parts add up to the peak, sweeps and single ones are read, a missing compiler is a line."""

import importlib.util
import json

import pytest

from a1jax.analysis import made, pod_plan
from a1jax.config import ConfigError


def program(peak=100e9, fits=True, speed=10.0):
    return {
        "stage": "sft", "program": "train_step", "tokens": 2048, "argument_bytes": 40e9, "temp_bytes": peak - 56e9, "output_bytes": 45e9,
        "aliased_bytes": 36e9, "code_bytes": 2e9, "beside": {"x": 5e9}, "beside_bytes": 5e9, "peak_bytes": peak, "hbm_bytes": 103e9,
        "fits": fits, "help": [] if fits else ["fewer rows"],
        "collectives": [{"kind": "all-gather", "axes": "fsdp", "count": 12, "bytes": 3e6, "wire_bytes": 2e6}],
        "estimate": {"tokens_per_second_per_chip": speed, "bound_by": "ici", "assumption": "an estimate"},
        "largest_buffers": [{"bytes": 8e6, "shape": "f32[2]", "scope": "layer0"}],
        "largest_arguments": [{"bytes": 4e6, "shape": "f32[1]", "name": "w"}],
    }  # fmt: skip


def report(mesh, **of_program):
    one = program(**of_program)
    return {"topology": "v5p:2x2x1", "mesh": mesh, **one, "programs": [one]}


def sweep():
    rows = [
        {"mesh": {"fsdp": 4}, "programs": [program(speed=10.0)]},
        {"mesh": {"fsdp": 2, "expert": 2}, "programs": [program(120e9, False, 30.0)]},
    ]
    rows += [{"mesh": {"fsdp": 2, "tensor": 2}, "programs": [program(speed=20.0)]}, {"mesh": {"fsdp": 3}, "reason": "4 devices"}]
    return {"topology": "v5p:2x2x1", "sweep": rows}


def test_parts_add_up_to_the_peak():
    parts = pod_plan.parts(program())
    assert parts == {"arguments": 40e9, "temporaries": 44e9, "outputs": 9e9, "code": 2e9, "beside": 5e9}
    assert sum(parts.values()) == program()["peak_bytes"]


def test_a_sweep_has_the_fastest_that_fits_first_and_the_impossible_last():
    found = pod_plan.parsed("s", sweep())
    rows = pod_plan.shapes(found).rows
    assert [row[1] for row in rows] == [
        "sft train_step, fsdp=2 tensor=2", "sft train_step, fsdp=4", "sft train_step, fsdp=2 expert=2", "fsdp=3"
    ]  # fmt: skip
    assert [row[2] for row in rows] == [20, 10, 30, None] and rows[-1][-1] == "4 devices"
    (panel,) = pod_plan.memory_figure(found).figure.panels
    assert panel.ylabel == "GB per device" and panel.parts["temporaries"] == (44.0, 64.0, 44.0) and "103 GB of HBM" in panel.title
    assert [sum(values[i] for values in panel.parts.values()) for i in range(3)] == pytest.approx([100, 120, 100])
    assert pod_plan.memory(found).rows[0][3:] == ("40 GB", "44 GB", "9 GB", "2 GB", "5 GB", "100 GB", "103 GB", True)
    assert panel.labels == tuple(str(row[0]) for row in pod_plan.memory(found).rows) == ("1", "2", "3")
    assert pod_plan.collectives(found).rows[0][1:] == ("all-gather", "fsdp", 12, "3 MB", "2 MB")
    assert ("sft train_step, fsdp=2 expert=2", "would help", "", "", "fewer rows") in pod_plan.largest(found).rows


def test_a_folder_of_reports_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(report({"fsdp": 4})))
    (tmp_path / "b.json").write_text(json.dumps({"command": ["compile"], "printed": sweep()}))
    found = pod_plan.plans(tmp_path, "not/read.py", "v5p:2x2x1", (), tmp_path)
    assert [r.name for r in found.reports] == ["a", "b", "b", "b"] and len(found.impossible) == 1
    assert pod_plan.read(tmp_path / "a.json").reports[0].mesh == {"fsdp": 4}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"topology": "v5p:2x2x1", "mesh": {}}'])
def test_what_is_no_report_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match="a.json: no report of"):
        pod_plan.read(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no \\*.json there"):
        pod_plan.read(tmp_path)


def test_without_the_compiler_every_view_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = pod_plan.plans(None, "x.py", "v5p:2x2x1", ({"fsdp": 4},), tmp_path)
    assert found.reports == () and list(tmp_path.iterdir()) == []
    for view in (pod_plan.shapes, pod_plan.memory, pod_plan.collectives, pod_plan.largest, pod_plan.programs):
        assert pod_plan.MISSING in repr(view(found)) and "pip install libtpu" in view(found)._repr_html_()
    assert pod_plan.MISSING in repr(pod_plan.memory_figure(found)) and pod_plan.memory_figure(found)._repr_html_()


def test_the_same_command_is_read_back_and_another_is_not(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(made, "command", lambda words, good: said.append(words) or json.dumps(report({"fsdp": 4})))
    for speed in ("1", "1", "2"):
        assert pod_plan.parsed("x", made.saved(tmp_path / "x.json", ["compile", speed])).reports
    assert said == [["compile", "1"], ["compile", "2"]]
