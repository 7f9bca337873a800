import json

import pytest

from a1jax.analysis import seeds
from a1jax.config import ConfigError
from a1jax.stages.evaluate import wilson


def fill(folder, wins, n=10, model="student"):
    (folder / "evaluations").mkdir(parents=True, exist_ok=True)
    value = {"success": wins / n, "n": n, "low": 0.0, "high": 1.0, "by_steps": {}, "statuses": {}}
    (folder / f"evaluations/{model}.json").write_text(json.dumps({"search": value}))
    return folder


def test_successes_and_n_are_summed_and_every_run_is_named(tmp_path):
    runs = [fill(tmp_path / "0", 9), fill(tmp_path / "1", 12, 30)]
    fill(tmp_path / "1", 3, model="sft")
    sft, student = seeds.rows(runs)
    low, high = wilson(21, 40)  # not the mean of 0.9 and 0.4
    assert student == {"domain": "search", "model": "student", "n": 40, "success": 21 / 40, "low": low, "high": high, "each": [0.9, 0.4]}
    assert (sft["n"], sft["each"]) == (10, [None, 0.3])
    text = seeds.table(runs)
    assert "52.5 [37-67]" in text and "90.0  40.0" in text and "mean over domains, student: 52.5" in text
    assert next(line for line in text.splitlines() if " sft " in line).split()[-2:] == ["-", "30.0"]  # which run it is can be told


def test_runs_that_cannot_be_pooled_are_refused(tmp_path):
    run = fill(tmp_path / "0", 9)
    for folders, words in (([run, run], "twice"), ([run, tmp_path / "0/../0"], "twice"), ([run, tmp_path / "no"], "no evaluations")):
        with pytest.raises(ConfigError, match=words):
            seeds.read(folders)
