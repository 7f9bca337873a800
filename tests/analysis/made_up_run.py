"""A run's folder made up for the tests of its page: evaluations of a few models, metrics of a few steps."""

import json

from a1jax import metrics, provenance
from a1jax.stages.evaluate import wilson


def score(wins, n, **more):
    low, high = wilson(wins, n)
    lengths = {"1": [wins, n], "10": [0, 0], "2": [0, n]}
    return {
        "success": wins / n,
        "low": low,
        "high": high,
        "n": n,
        "by_steps": lengths,
        "statuses": {"FINISHED": wins, "FAILED": n - wins},
        **more,
    }


SCORES = {
    "student": {
        "search": score(9, 10, tokens=50.5, tokens_p90=80.0, turns=3.0, tool_errors=0.25, stopping={"early": 1, "in_time": 7, "untold": 2})
    },
    "base": {"search": score(0, 10), "tool_calling": score(1, 8)},
    "teacher_search": {"search": score(8, 10), "tool_calling": score(2, 8)},
    "teacher_tool_calling": {"tool_calling": score(8, 8)},
}


def fill(folder, stage="sft"):
    (folder / "evaluations").mkdir(parents=True)
    for model, of_model in SCORES.items():
        (folder / f"evaluations/{model}.json").write_text(json.dumps(of_model))
    with metrics.Writer(folder) as writer:
        for step in (1, 2, 3):
            load = {"router/load": [[0.25, 0.75], [0.5, 0.5]]} if step == 3 else {}
            writer.write(step, stage, {"ce": 2.0 / step, "router/max_load": 2.0 - step / 4}, load)
            writer.write(step, "t_grpo", {"grpo/reward": 0.1 * step, "grpo/reward/format": 0.5, "grpo/kl": 0.01, "router/entropy": 9.0})
            writer.write(step, "distill", {"distill/coverage": float("nan") if step == 2 else 0.9, "rollout/success/search": 0.5})
    provenance.start(folder, provenance.collect(["run", "x.py"], 7))
    return folder
