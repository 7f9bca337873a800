import dataclasses
import json

import numpy as np

from a1jax.rollout.agent import Engine, Limits
from a1jax.stages import evaluate, kept_runs
from a1jax.types import FAILED, FINISHED, TRUNCATED, Record, Rollout, Trajectory


def test_wilson_by_hand_and_at_the_ends():
    # p = 0.8, n = 10, z = 1.96: centre (0.8 + 0.19208) / 1.38416, half 1.96 sqrt(0.016 + 0.009604) / 1.38416
    low, high = evaluate.wilson(8, 10)
    np.testing.assert_allclose([low, high], [(0.99208 - 0.313626) / 1.38416, (0.99208 + 0.313626) / 1.38416], rtol=1e-4)
    assert evaluate.wilson(0, 0) == (0.0, 1.0)
    assert evaluate.wilson(0, 50)[0] == 0.0 and evaluate.wilson(50, 50)[1] == 1.0
    assert 0.0 < evaluate.wilson(0, 50)[1] < 0.08


def test_wilson_covers_the_truth():
    rng = np.random.default_rng(0)
    inside = [low <= 0.3 <= high for low, high in (evaluate.wilson(int(rng.binomial(60, 0.3)), 60) for _ in range(2000))]
    assert 0.92 < np.mean(inside) < 0.97  # at n = 60 its coverage swings a little round 95 %


def run_of(status, reward):
    return Rollout("t", "search", np.zeros(10, np.int32), np.zeros(10, np.float32), np.zeros(10, np.float32), status, reward, 2)


def test_score_counts_only_finished_wins_by_length():
    out = evaluate.score([run_of(FINISHED, 1.0), run_of(FAILED, 0.0), run_of(TRUNCATED, 0.0), run_of(FINISHED, 1.0)], [1, 1, 2, 2])
    assert out["success"] == 0.5 and out["by_steps"] == {"1": [1, 2], "2": [1, 2]} and out["n"] == 4
    assert out["statuses"] == {FAILED: 1, FINISHED: 2, TRUNCATED: 1}


def test_an_evaluation_is_computed_once_and_read_back(setting):
    engine = Engine(setting.model, setting.tokenizer, Limits(slots=4, max_length=96, max_turns=3, max_turn_tokens=8, temperature=0.0))
    params, path = setting.init_params(), setting.workdir / "evaluations/base.json"
    cfg = evaluate.Evaluation({1: 3})
    out = evaluate.run(cfg, params, engine, setting.families, "base", path)
    assert {d: s["n"] for d, s in out.items()} == {"search": 3, "tool_calling": 3} and out["search"]["success"] == 0.0
    path.write_text(json.dumps({**out, "marker": 1}))
    assert evaluate.run(cfg, None, engine, {}, "base", path)["marker"] == 1


def with_trajectory(messages=(), records=(), **changes):
    trajectory = Trajectory("search", "t", tuple(messages), records=tuple(records))
    return dataclasses.replace(run_of(FAILED, 0.0), trajectory=trajectory, **changes)


def test_tool_errors_tokens_and_stops_by_hand():
    call = {"name": "search", "arguments": {}}
    refused, fine, verdict = (
        Record((), call, "error", "schema: refused"),
        Record((), call, "text"),
        Record((), None, None, "schema: refused"),
    )
    unread = [{"role": "tool", "name": "parser", "content": "error"}, {"role": "tool", "name": "search", "content": "text"}]
    runs = [with_trajectory(unread, [refused, fine, verdict]), with_trajectory(), with_trajectory([], [refused, refused])]
    runs = [dataclasses.replace(r, tokens=np.zeros(n, np.int32)) for r, n in zip(runs, (10, 20, 60), strict=True)]
    out = evaluate.score(runs, [1, 1, 1], ["early", "late", "early"])
    assert [evaluate.tool_errors(r.trajectory) for r in runs] == [2, 0, 2] and out["tool_errors"] == 4 / 3
    named = Record((), {"name": "parser", "arguments": {}}, "error", "schema: refused")  # a call of that name is one error, not two
    assert evaluate.tool_errors(with_trajectory(unread[:1], [named]).trajectory) == 1
    assert (out["tokens"], out["tokens_p90"]) == (30.0, 52.0)  # of 10, 20, 60: 90 % of the way is 0.8 between 20 and 60
    assert out["stopping"] == {"early": 2, "in_time": 0, "late": 1, "never": 0, "untold": 0}
    assert "stopping" not in evaluate.score(runs, [1, 1, 1])


def test_every_number_of_an_evaluation_can_be_counted_again_from_its_runs(setting, monkeypatch):
    engine = Engine(setting.model, setting.tokenizer, Limits(slots=4, max_length=128, max_turns=3, max_turn_tokens=16, temperature=0.0))
    path, seen = setting.workdir / "evaluations/base.json", []
    monkeypatch.setattr(kept_runs, "to_trajectory", lambda r, f=kept_runs.to_trajectory, **k: (seen.append(r), f(r, **k))[1])
    out = evaluate.run(evaluate.Evaluation({1: 2, 2: 2}), setting.init_params(), engine, setting.families, "base", path)
    again = evaluate.score_again(evaluate.runs_of(path))
    assert again == {d: {k: v for k, v in s.items() if k != "tasks"} for d, s in out.items()}
    kept = [kept_runs.to_rollout(k) for k in kept_runs.read(evaluate.runs_of(path))]
    for before, after in zip(seen, kept, strict=True):
        for name in ("tokens", "sampled"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
        np.testing.assert_allclose(after.logp, before.logp, atol=5.1e-5)
        assert after.trajectory.messages == before.trajectory.messages and after.turns == before.turns
    assert {k.metadata["model"] for k in kept_runs.read(evaluate.runs_of(path))} == {"base"}
