import json

import numpy as np

from a1jax.rollout.agent import Engine, Limits
from a1jax.stages import evaluate
from a1jax.types import FAILED, FINISHED, TRUNCATED, Rollout


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
