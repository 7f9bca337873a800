"""Lengths of runs: what is counted, which steps reach a horizon, which family answers it."""

import dataclasses

import numpy as np
import pytest

from a1jax.config import ConfigError
from a1jax.domains import DOMAINS, LongContext, solve
from a1jax.domains.base import tool
from a1jax.domains.instruction_following import InstructionFollowing
from a1jax.stages.horizon import LONGEST, Counter, Plan, plan
from a1jax.types import Trajectory

COUNT = Counter()


def test_the_conversation_is_counted_and_what_stands_above_it_on_demand():
    messages = ({"role": "system", "content": "S" * 40}, {"role": "user", "content": "abcd"}, {"role": "assistant", "content": "e"})
    run = Trajectory("d", "t", messages, (tool("f", "x" * 80),), ())
    said = "<|im_start|>user\nabcd<|im_end|>\n<|im_start|>assistant\ne<|im_end|>\n"
    assert COUNT(run) == -(-len(said) // 4) == 17
    assert Counter(standing=True)(run) > COUNT(run) + 40 / 4 + 80 / 4


def test_a_tokenizer_counts_what_it_encodes(domain_tokenizer):
    from a1jax.data import chat

    run, count = solve(DOMAINS["search"].propose(0, 3)), Counter(domain_tokenizer)
    assert count(run) == len(chat.tokenize(domain_tokenizer, run.messages)[0]) != COUNT(run)
    assert count.text("in the sea") == len(domain_tokenizer.encode("in the sea"))


def test_steps_bring_the_mean_to_the_horizon():
    made = Plan(DOMAINS["search"], 100, 2, 3, 90.0, 130.0)
    assert [made.steps(0, 0), made.steps(1, 90), made.steps(2, 220), made.steps(2, 180)] == [2, 2, 2, 3]
    wide = Plan(DOMAINS["search"], 100, 10, 20, 50.0, 150.0)
    assert [wide.steps(0, 0), wide.steps(1, 120), wide.steps(1, 10), wide.steps(1, 190)] == [15, 13, 20, 10]
    rng, tokens = np.random.default_rng(0), 0
    for runs in range(200):
        tokens += {2: 90, 3: 130}[made.steps(runs, tokens)] + int(rng.integers(-5, 6))
    assert tokens / 200 == pytest.approx(100, abs=0.3)


@pytest.mark.parametrize(("horizon", "family"), [(100, InstructionFollowing), (200, InstructionFollowing), (400, LongContext)])
def test_constraints_are_kept_as_long_as_they_reach(horizon, family):
    made = plan(DOMAINS["instruction_following"], horizon, COUNT, 0, "train")
    assert type(made.domain) is family


def test_other_constraints_do_not_turn_into_questions():
    with pytest.raises(ConfigError, match="longest runs of InstructionFollowing"):
        plan(InstructionFollowing(kinds=("no_comma", "title")), 900, COUNT, 0, "train")


def test_where_a_family_ends_its_shortest_or_longest_tasks_are_taken():
    general = plan(DOMAINS["general"], 200, COUNT, 0, "train")
    assert general.short == general.long == 1 and general.most < 300 and general.least == 0
    constraints = plan(DOMAINS["instruction_following"], 200, COUNT, 0, "train")
    assert constraints.short == constraints.long == 8 and constraints.least > 170
    for made in (general, constraints):
        assert made.below == pytest.approx(200, rel=0.05) and made.end == ""
    assert plan(DOMAINS["science"], 200, COUNT, 0, "train").end == "shortest"
    with pytest.raises(ConfigError, match="shortest runs of General have .* ask for that or more"):
        plan(DOMAINS["general"], 60, COUNT, 0, "train")


def test_a_register_is_fitted_by_the_tokenizer_that_counts(domain_tokenizer):
    for count in (COUNT, Counter(domain_tokenizer)):
        for horizon in (500, 20_000):
            made = plan(LongContext(), horizon, count, 0, "train")
            assert count(solve(made.domain.propose(5, 1))) == pytest.approx(horizon, rel=0.05)


def test_no_length_is_too_much_to_think_about():
    made = plan(DOMAINS["tool_calling"], LONGEST // 4, COUNT, 0, "train")
    assert dataclasses.replace(made, domain=None).short > 500
