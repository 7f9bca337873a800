import math

from a1jax.analysis import expert_load, figures

LINES = [
    {"stage": "sft", "step": 1, "router/max_load": 3.0, "router/load": [[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]]},
    {"stage": "sft", "step": 2, "router/max_load": 1.5, "router/load": [[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]},
    {"stage": "grpo", "step": 1, "router/max_load": math.nan},
    {"stage": "grpo", "step": 2, "router/max_load": 1.25, "ce": 1.0},
]


def test_load_is_a_share_times_the_number_of_experts_at_the_last_step():
    busiest, heat = expert_load.figure(LINES).panels
    assert [(line.label, line.x, line.y) for line in busiest.lines] == [("sft", (1, 2), (3.0, 1.5)), ("grpo", (2,), (1.25,))]
    assert heat.title == "sft, step 2" and heat.values == ((1.0, 1.0), (0.5, 1.5), (1.0, 1.0))
    assert (heat.x, heat.y, heat.limits) == ((1, 2), (1, 2, 3), (0.0, 2.0))
    table = figures.rows(expert_load.figure(LINES))
    assert [r["value"] for r in table if (r["panel"], r["series"], r["x"]) == ("sft, step 2", "2", 2)] == [1.5]


def test_of_many_stages_the_first_and_the_last_are_drawn_and_of_none_nothing():
    many = [{**LINES[1], "stage": f"t{i}"} for i in range(8)]
    figure = expert_load.figure(many)
    assert [panel.title.partition(",")[0] for panel in figure.panels[1:]] == ["t0", "t1", "t2", "t3", "t7"]
    assert "first 4 stages and of the last" in figure.caption
    assert expert_load.figure([{"stage": "sft", "step": 1, "ce": 1.0, "router/load": [[math.nan]]}]).panels == ()
