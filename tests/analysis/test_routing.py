"""Expert load by domain: shares, distances and chance by hand; of a run folder made here, the counts themselves."""

import dataclasses
import json
import math

import numpy as np
import pytest

from a1jax import config, metrics
from a1jax.analysis import figures, routing
from a1jax.config import ConfigError
from a1jax.stages import pipeline
from a1jax.stages.experts import Runs


def made_up(pairs, of_run, domains=("a", "b")):
    return routing.Loads("made up", tuple(domains), np.array(of_run), np.asarray(pairs, float))


def test_shares_by_hand():
    """Two runs of one domain add up as pairs, not as shares: a long run counts for more."""
    found = routing.shares(np.array([[[3.0, 1.0]], [[1.0, 3.0]], [[0.0, 8.0]]]), np.array([0, 1, 1]), 2)
    np.testing.assert_allclose(found, [[[0.75, 0.25]], [[1 / 12, 11 / 12]]])


def test_distances_by_hand():
    """Nothing in common is 1, equal is 0, and (1, 0) against (1/2, 1/2): both against their mean (3/4, 1/4), in bits."""
    shares = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]], [[0.5, 0.5]]])
    (found,) = routing.distances(shares)
    half = math.sqrt((math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5 * math.log2(2)) / 2)
    np.testing.assert_allclose(found, [[0, 1, half, half], [1, 0, half, half], [half, half, 0, 0], [half, half, 0, 0]], atol=1e-12)


def test_distances_do_not_depend_on_the_experts_order():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(5), (3, 2))
    order = rng.permutation(5)
    np.testing.assert_allclose(routing.distances(shares), routing.distances(shares[:, :, order]), atol=1e-12)
    found = routing.distances(shares)
    np.testing.assert_allclose(found, np.swapaxes(found, 1, 2), atol=1e-12)
    assert (found[:, [0, 1, 2], [0, 1, 2]] == 0).all() and found.max() <= 1


def test_domains_that_differ_are_told_from_chance_and_equal_ones_are_not():
    rng = np.random.default_rng(1)
    of_run = [0] * 8 + [1] * 8
    same = rng.multinomial(400, [0.4, 0.3, 0.3], 16)
    other = np.concatenate([same[:8], rng.multinomial(400, [0.2, 0.5, 0.3], 8)])
    found = routing.apart(made_up(np.stack([same, other], axis=1), of_run), shuffles=200)
    assert found.found[1] > found.most[1] > found.dealt[1] and found.p[1] == pytest.approx(1 / 201)
    assert found.p[0] > 0.05 and found.found[0] < 0.1 < found.found[1]
    assert found == routing.apart(made_up(np.stack([same, other], axis=1), of_run), shuffles=200)


def test_one_domain_has_no_distance():
    with pytest.raises(ConfigError, match="needs two"):
        routing.apart(made_up([[[1.0, 1.0]]], [0], ("a",)))


def test_views_by_hand():
    loads = made_up([[[3.0, 1.0, 0.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]]], [0, 1])
    table = routing.evenness(loads)
    effect = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert table.rows[0] == ("a", 1, 1, 3.0, pytest.approx(effect)) and table.rows[1][3:] == (1.0, pytest.approx(4.0))
    (panel,) = routing.heat_map(loads).figure.panels
    assert panel.values == ((1.0, 1.0, 1.0, 1.0), (3.0, 1.0, 0.0, 0.0)) and panel.limits == (0.0, 3.0) and panel.yticks == ("b", "a")
    (panel,) = routing.distance_map(loads).figure.panels
    assert panel.values[0][1] == 0 and panel.values[0][0] == panel.values[1][1] == pytest.approx(routing.distances(loads.shares)[0, 0, 1])
    assert figures.rows(routing.heat_map(loads).figure)
    assert [row[:2] for row in routing.specialisation(loads, loads).rows] == [("made up", 1)] * 2


@pytest.fixture(scope="module")
def run(tmp_path_factory, request):
    """What ``first_stage`` leaves of a small quickstart, but for the training (which the notebook's test does)."""
    cfg = config.override(config.load(quickstart(request)), SMALL)
    folder = tmp_path_factory.mktemp("runs") / "quickstart-smoke-stage-1"
    config.save(cfg, folder / "config.py")
    with metrics.Writer(folder) as writer:
        setting = dataclasses.replace(pipeline.open_setting(cfg, folder, writer), seed=7)
        setting.finish("sft", setting.init_params(), {"steps": 0, "seconds": 0.0})
    return folder


SMALL = ("sft.max_length=160", "evaluation.counts={1: 2, 2: 2}")


def quickstart(request):
    return f"{request.config.rootpath}/experiments/quickstart.py:smoke"


def test_every_token_of_every_run_is_counted(run):
    found = routing.of_run(run, "sft", each=3)
    assert found.domains == ("search", "tool_calling") and found.of_run.tolist() == [0, 0, 0, 1, 1, 1]
    runs, layers, experts = found.pairs.shape
    model = json.loads((run / "stages/sft/model.json").read_text())["model"]
    assert (runs, layers, experts) == (6, model["num_layers"], model["num_experts"])
    counts = found.pairs.round()
    np.testing.assert_allclose(found.pairs, counts, atol=1e-3)  # whole pairs
    of_layer = counts.sum(axis=2)
    assert (of_layer == of_layer[:, :1]).all() and (of_layer > 20).all() and (of_layer % model["num_experts_active"] == 0).all()


def test_random_parameters_are_another_model_on_the_same_runs(run):
    trained, random = routing.of_run(run, "sft", each=3), routing.untrained(run, each=3)
    np.testing.assert_allclose(trained.pairs.sum(axis=2), random.pairs.sum(axis=2), rtol=1e-5)
    assert np.abs(trained.pairs - random.pairs).max() > 0.5 and random.name == "random parameters"


def test_a_stage_is_trained_once_and_another_config_is_refused(run, request, capsys):
    into = run.parent
    assert routing.first_stage(quickstart(request), into, SMALL) == run
    assert "steps" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="another config"):
        routing.first_stage(quickstart(request), into, (*SMALL, "seed=1"))


def test_held_out_runs_are_spread_over_what_the_evaluation_asks(request):
    cfg = config.load(quickstart(request))
    assert routing.held_out(cfg, "search", 5) == (Runs({1: 3, 2: 2}),)
    own = (Runs({1: 9, 3: 9}), Runs({2: 9}, cfg.family("search")))
    cfg = dataclasses.replace(cfg, evaluation=dataclasses.replace(cfg.evaluation, of={"search": own}))
    assert routing.held_out(cfg, "search", 5) == (Runs({1: 2, 3: 2}), Runs({2: 1}, cfg.family("search")))
