"""Teachers that cut the text elsewhere, of other widths: everything from runs to the loss against dense float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import params as param_specs
from a1jax.align import spans, target
from a1jax.models import transformer
from a1jax.stages import cross_tokenizer, distill, full, scoring, views
from a1jax.stages.distill import DistillConfig

NAMES = ("search", "tool_calling")
VOCABULARIES = {"search": (cross_tokenizer.digits, 608), "tool_calling": (cross_tokenizer.pieces, 720)}
K, LENGTH, ROWS, THEIRS = 5, 192, 3, 140
ONE_LAYER = {"num_layers": 1, "full_attention_interval": 1}  # of attention: what is tested here comes after it


@pytest.fixture(scope="module")
def runs(foreign_runs):
    return foreign_runs


@pytest.fixture(scope="module")
def teachers(foreign_teacher):
    return {domain: foreign_teacher(domain) for domain in NAMES}


@functools.partial(jax.jit, static_argnums=2)
def hidden_states(params, tokens, model):
    return transformer.apply(params, tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens), model)[0][0]


def log_softmax(params, model, tokens):
    """float64 [LENGTH, V]: row t is what the model says of token t + 1, one run alone."""
    hidden = hidden_states(params, np.pad(tokens, (0, LENGTH - len(tokens)))[None], model)
    logits = np.asarray(hidden, np.float64) @ np.asarray(transformer.unembed(params, model), np.float64).T
    return logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)


def dense(run, teacher, student, limit):
    """(flat positions in the run, dense Target joined over its turns): by the definitions, nothing packed or padded."""
    (view,) = views.view_all([run], student, teacher.tokenizer, False)
    log_p = log_softmax(teacher.params, teacher.model, view.tokens)
    at, parts = [], []
    for (a, b), (c, d) in zip(view.ours, view.theirs, strict=True):
        ours, theirs = run.tokens[a:b], view.tokens[c:d]
        found = spans.align(ours, theirs, teacher.vocab_map)
        unread = c + found.last >= limit + 1  # row j - 1 says what token j is, and rows end at the limit
        found = dataclasses.replace(found, masked=found.masked | unread)
        at += range(a - 1, b - 1)
        parts.append((target.target(log_p[c - 1 : d - 1], ours, theirs, found, teacher.vocab_map), found))
    return np.array(at), parts


@pytest.fixture(scope="module")
def scored(tokenizer, runs, teachers):
    """By mode: what the stage makes of the runs."""
    out = {}
    for mode in ("salient", "sampled"):
        scorers, members = scoring.make_scorers(teachers, tokenizer, K, 256, mode == "sampled", False, THEIRS)
        pieces, where, shares = [], [], {}
        for index, domain in enumerate(NAMES):
            placed = distill.pack_domain([r for r in runs if r.domain == domain], index, ROWS, LENGTH)
            assert placed.left_out == 0 and max(placed.start) > 0  # two runs share a row, also two views of the first domain
            batch, scores, found = scorers[domain].score(placed, jax.tree.map(jnp.asarray, placed.batch))
            pieces.append({"batch": batch, **scores})
            where += [(run, index * ROWS + row, start) for run, row, start in zip(placed.runs, placed.row, placed.start, strict=True)]
            shares |= {f"{name}/{domain}": value for name, value in found.items()}
        out[mode] = jax.tree.map(lambda *x: jnp.concatenate(x), *pieces), members, where, shares
    return out


@pytest.fixture(scope="module")
def expected(tokenizer, runs, teachers):
    return [dense(run, teachers[run.domain], tokenizer, THEIRS) for run in runs]


def find(runs, run):
    return next(n for n, r in enumerate(runs) if r is run)


def test_scores_masks_and_shares_are_the_dense_ones(tokenizer, runs, teachers, scored, expected):
    data, _, where, shares = scored["salient"]
    said = scored["sampled"][0]["score"]
    count = dict.fromkeys(NAMES, 0)
    seen = {d: {"straddled": 0, "chained": 0, "masked": 0} for d in NAMES}
    lone = beyond = 0
    for run, row, start in where:
        at, parts = expected[find(runs, run)]
        size, shift = len(tokenizer.table), NAMES.index(run.domain) * len(tokenizer.table)
        places = iter(at)
        for made, found in parts:
            for i in range(len(made.masked)):
                column = start + next(places)
                count[run.domain] += 1
                seen[run.domain]["masked"] += bool(made.masked[i])
                assert bool(data["batch"].mask[row, column]) == (not made.masked[i])
                if made.masked[i]:
                    continue
                seen[run.domain]["straddled"] += bool(found.offset[i] > 0)
                seen[run.domain]["chained"] += bool(found.last[i] > found.teacher[i])
                np.testing.assert_allclose(said[row, column], made.score[i], rtol=1e-4, atol=1e-4)
                values, units = np.asarray(data["teacher_logits"][row, column]), np.asarray(data["support"][row, column])
                alone = int(data["alone"][row, column])
                assert alone == made.alone[i]
                kept = units >= 0
                assert ((units[kept] - shift >= 0) & (units[kept] - shift < size)).all() and (values[:K][~kept[:K]] == -np.inf).all()
                with np.errstate(divide="ignore"):
                    q = np.log(made.q[i])
                np.testing.assert_allclose(values[kept], q[units[kept] - shift], rtol=1e-4, atol=2e-4)
                if alone >= 0:
                    lone += 1
                    np.testing.assert_allclose(values[-1], q[alone], rtol=1e-4, atol=2e-4)
                elif found.last[i] == found.teacher[i]:  # nothing was moved: the k best
                    best = np.sort(made.q[i])[::-1]
                    np.testing.assert_allclose(np.exp(values[:K]), best[:K], rtol=1e-3, atol=1e-6)
                    beyond += best[K] > 0
    assert lone > 5 and beyond > 5
    for domain in NAMES:
        assert shares[f"align/positions/{domain}"] == count[domain] == sum(r.sampled.sum() for r in runs if r.domain == domain)
        for name, number in seen[domain].items():
            share = shares[f"align/{name}/{domain}"]
            assert share * count[domain] == pytest.approx(number), (domain, name)
    # A vocabulary of pieces has tokens that run on; one of digits has chains wherever a number stands.
    assert seen["tool_calling"]["straddled"] > 5 and seen["search"]["chained"] > 5 and sum(s["masked"] for s in seen.values()) > 0


def test_the_loss_of_a_step_is_the_papers_formula_on_units(tokenizer, small_model, runs, teachers, scored, expected):
    model = dataclasses.replace(small_model, load_balance_coef=0.0, **ONE_LAYER)
    student = param_specs.init(transformer.specs(model), jax.random.key(7))
    data, members, where, _ = scored["salient"]
    cfg = DistillConfig(k=K, vocab_block=256)
    value, out = jax.jit(lambda p, x: distill.loss(p, distill.weigh(x, 2, "domain_mean"), 1.0, model, cfg, members))(student, data)
    means, covered = {d: [] for d in NAMES}, []
    for run, row, start in where:
        teacher, (at, parts) = teachers[run.domain], expected[find(runs, run)]
        shift = NAMES.index(run.domain) * len(tokenizer.table)
        p = np.exp(log_softmax(student, model, run.tokens))[at]
        alone, q = np.concatenate([m.alone for m, _ in parts]), np.concatenate([m.q for m, _ in parts])
        folded, _ = target.fold(p, teacher.vocab_map, alone)
        terms = []
        for i in np.flatnonzero(~np.concatenate([m.masked for m, _ in parts])):
            values, units = (np.asarray(data[n][row, start + at[i]]) for n in ("teacher_logits", "support"))
            own = units[(units >= 0) & (values > -np.inf)] - shift
            own = np.union1d(own, [alone[i]] if alone[i] >= 0 else own)
            own = own[folded[i, own] > 0]
            ours, theirs = (x[i, own] / x[i, own].sum() for x in (folded, q))
            covered.append(folded[i, own].sum())
            terms.append((ours * np.log(ours / theirs)).sum())
        means[run.domain].append(np.mean(terms))
    np.testing.assert_allclose(value, np.mean([np.mean(m) for m in means.values()]), rtol=2e-4)
    np.testing.assert_allclose(distill.finish(out)["distill/coverage"], np.mean(covered), rtol=1e-4)


def test_mode_full_is_the_dense_divergence_over_all_units(tokenizer, small_model, runs, teachers, expected):
    model = dataclasses.replace(small_model, load_balance_coef=0.0, **ONE_LAYER)
    student = param_specs.init(transformer.specs(model), jax.random.key(7))
    cfg = DistillConfig(mode="full", vocab_block=256, rows=ROWS)
    scorers, members = scoring.make_scorers(teachers, tokenizer, K, 256, False, False, THEIRS, True)
    assert members is None
    batches, scores, where = [], [], []
    for index, domain in enumerate(NAMES):
        placed = distill.pack_domain([r for r in runs if r.domain == domain], index, ROWS, LENGTH)
        batch, said, _ = scorers[domain].score(placed, jax.tree.map(jnp.asarray, placed.batch))
        batches.append(batch)
        scores.append(said)
        where += placed.runs
    data = {"batch": full.together(batches, 1), "full": scores}
    frozen = full.frozen([teachers[d] for d in NAMES], cfg.vocab_block)
    step = jax.jit(lambda p, x, frozen: distill.loss(p, distill.weigh(x, 2, "domain_mean"), 1.0, model, cfg, frozen=frozen))
    value, _ = step(student, data, frozen)
    means, lone = {d: [] for d in NAMES}, 0
    for run in where:
        teacher, (at, parts) = teachers[run.domain], expected[find(runs, run)]
        alone, q, masked = (np.concatenate([getattr(m, name) for m, _ in parts]) for name in ("alone", "q", "masked"))
        residual = np.concatenate([m.residual for m, _ in parts])
        folded, rest = target.fold(np.exp(log_softmax(student, model, run.tokens))[at], teacher.vocab_map, alone)
        terms = []
        for i in np.flatnonzero(~masked):
            there = q[i] > 0
            ours = np.append(folded[i, there], folded[i, ~there].sum() + rest[i])
            theirs = np.append(q[i, there], residual[i])
            ours[-1], theirs[-1] = max(ours[-1], 2.0**-24), max(theirs[-1], 2.0**-24)
            terms.append((ours * np.log(ours / theirs)).sum())
        lone += int((alone[~masked] >= 0).sum())
        means[run.domain].append(np.mean(terms))
    assert lone > 5
    np.testing.assert_allclose(value, np.mean([np.mean(m) for m in means.values()]), rtol=2e-4)
