"""Teachers of other tokenizers in stage 3: the same as the native one where they must be, counted and masked where they cannot be."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a1jax import checkpoint, optim, sharding, train
from a1jax.align import byte_table
from a1jax.config import ConfigError, bind
from a1jax.data.errors import DataError
from a1jax.data.tokenizer import train_sentencepiece
from a1jax.domains import QUICKSTART
from a1jax.models import transformer
from a1jax.rollout.agent import Limits
from a1jax.stages import cross_tokenizer, distill, experts, folders, scoring, views
from a1jax.stages.distill import DistillConfig

LIMITS = Limits(slots=4, max_turns=3, max_turn_tokens=8, max_length=96, temperature=1.0)
CFG = DistillConfig(
    steps=3, prompts=3, lengths=(1, 2), rows=2, max_length=96, k=6, optimizer=bind(optim.adamw, learning_rate=1e-2), limits=LIMITS,
    save_every=1, vocab_block=256,
)  # fmt: skip


def shuffled(tokenizer, order):
    """The same tokenizer with other ids: order[i] is the new one of i."""
    old = np.argsort(order)
    encode, batch = tokenizer.encoder, tokenizer.batch_encoder
    renamed = {name: int(order[getattr(tokenizer, name)]) for name in ("pad_id", "eos_id")}
    return dataclasses.replace(
        tokenizer,
        **renamed,
        bos_id=None if tokenizer.bos_id is None else int(order[tokenizer.bos_id]),
        spelling=tuple(tokenizer.spelling[i] for i in old),
        table=tuple(tokenizer.table[i] for i in old),
        pieces={text: int(order[i]) for text, i in tokenizer.pieces.items()},
        encoder=lambda text: [int(order[i]) for i in encode(text)],
        batch_encoder=lambda texts: [[int(order[i]) for i in ids] for ids in batch(texts)],
    )


@pytest.fixture()
def setting(setting):
    """One layer of attention: what is tested here comes after it."""
    return dataclasses.replace(setting, model=dataclasses.replace(setting.model, num_layers=1, full_attention_interval=1))


@pytest.fixture(scope="module")
def order(tokenizer):
    return np.random.default_rng(0).permutation(tokenizer.vocab_size)


@pytest.fixture()
def models(setting):
    student = setting.init_params()
    teacher = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), student)
    return student, teacher


@pytest.fixture()
def stranger(setting, models, order):
    """The teacher with shuffled ids: it says the same in other numbers."""
    table = models[1]["embed_tokens"]
    params = {**models[1], "embed_tokens": table[np.argsort(order)]}
    student = (setting.model, setting.tokenizer)
    return scoring.open_teacher(params, setting.model, shuffled(setting.tokenizer, order), student)


def batch_of(runs, setting, teachers, cfg=CFG, rows=2, length=96):
    """What stage 3 trains on at one step."""
    sampled = cfg.mode == "sampled"
    scorers, members = scoring.make_scorers(teachers, setting.tokenizer, cfg.k, 256, sampled, False, cfg.teacher_max_length or length)
    pieces, shares = [], {}
    for index, domain in enumerate(setting.domains):
        placed = distill.pack_domain([r for r in runs if r.domain == domain], index, rows, length)
        assert placed.left_out == 0
        batch, scores, found = scorers[domain].score(placed, jax.tree.map(jnp.asarray, placed.batch))
        pieces.append({"batch": batch, **scores})
        shares |= {f"{name}/{domain}": value for name, value in found.items()}
    return jax.tree.map(lambda *x: jnp.concatenate(x), *pieces), members, shares


def value_and_grad(model, cfg):
    def loss(params, data, members):
        return distill.loss(params, distill.weigh(data, 2, "domain_mean"), 1.0, model, cfg, members)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def close(got, expected, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(float(np.abs(b).max()), 1e-6))


@pytest.mark.parametrize("mode", ["salient", "sampled"])
def test_other_names_of_the_same_tokens_change_nothing(setting, models, stranger, runs, mode):
    """One domain's teacher has shuffled ids, the other's has not; both say what the native one says: value and all gradients."""
    student, teacher = models
    assert stranger.vocab_map.mode == "two_sided"
    native = scoring.Teacher(teacher, setting.model, setting.tokenizer)
    cfg, model = dataclasses.replace(CFG, mode=mode), dataclasses.replace(setting.model, load_balance_coef=0.0)
    first, second = setting.domains
    plain, none, _ = batch_of(runs, setting, dict.fromkeys(setting.domains, native), cfg)
    mixed, members, shares = batch_of(runs, setting, {first: native, second: stranger}, cfg)
    assert none is None and (members is None) == (mode == "sampled")
    assert shares[f"align/straddled/{second}"] == shares[f"align/chained/{second}"] == shares[f"align/masked/{second}"] == 0
    assert shares[f"align/positions/{second}"] == sum(r.sampled.sum() for r in runs if r.domain == second)
    np.testing.assert_array_equal(mixed["batch"].mask, plain["batch"].mask)
    seen = np.asarray(plain["batch"].mask) > 0
    # Ids with equal bytes, and the kinds of stop, are one unit there and several ids here: those positions are left out.
    size = setting.model.vocab_size
    lone = np.bincount(stranger.vocab_map.unit_of_student + 1, minlength=size + 1)[1:] == 1
    ids = plain["support"] if mode == "salient" else plain["batch"].targets[:, :, None]
    seen &= lone[np.asarray(ids)].all(2)
    assert seen.sum() > 0.5 * np.asarray(plain["batch"].mask).sum() and all(seen[2 * i : 2 * i + 2].any() for i in (0, 1))
    if mode == "salient":
        shift = np.where(np.asarray(mixed["batch"].domains) == 1, size, 0)  # the second map's units
        units = np.asarray(mixed["support"]) - shift[:, :, None]
        same = (np.sort(units[:, :, :-1]) == np.sort(np.asarray(plain["support"]))).all(2)
        assert same[seen].mean() > 0.8  # elsewhere a sum of several ids is among the best
        seen &= same
        assert (np.asarray(mixed["support"])[seen][:, -1] == -1).all()
    else:
        np.testing.assert_allclose(np.asarray(mixed["score"])[seen], np.asarray(plain["score"])[seen], atol=2e-5)
    plain, mixed = ({**d, "batch": d["batch"].replace(mask=seen.astype(np.float32))} for d in (plain, mixed))
    step = value_and_grad(model, cfg)
    close(step(student, mixed, members)[0][0], step(student, plain, none)[0][0])
    close(step(student, mixed, members)[1], step(student, plain, none)[1])


def test_packing_and_microbatches_change_nothing(setting, models, stranger, runs):
    student, model = models[0], dataclasses.replace(setting.model, load_balance_coef=0.0)
    teachers = dict.fromkeys(setting.domains, stranger)
    narrow, members, _ = batch_of(runs, setting, teachers)
    wide, _, _ = batch_of(runs, setting, teachers, rows=1, length=192)
    weigh = functools.partial(distill.weigh, num_domains=2, reduction="domain_mean")
    loss = functools.partial(distill.loss, model=model, cfg=CFG, members=members)
    keep = optax.trace(0.0)  # an optimizer whose state is the gradient
    steps = {count: jax.jit(train.make_train_step(loss, keep, count, weigh, distill.finish)) for count in (1, 2)}
    state = train.init_state(student, keep, 0)
    (after, expected), *others = [steps[count](state, data) for count, data in ((1, narrow), (1, wide), (2, narrow))]
    for other, out in others:
        close(other.opt_state.trace, after.opt_state.trace)
        for name in ("loss", "grad_norm", "distill/kl", "distill/coverage", "distill/tokens"):
            np.testing.assert_allclose(out[name], expected[name], rtol=1e-5, err_msg=name)


def test_what_cannot_be_aligned_is_masked_and_counted(setting, stranger, runs):
    """A byte that is no character, and a context that ends before the run does."""
    odd = [i for i, b in enumerate(byte_table.of(setting.tokenizer).bytes) if b == b"\xc3"][0]
    run = next(r for r in runs if r.domain == setting.domains[0])
    at = int(np.flatnonzero(run.sampled)[2])
    tokens, sampled = (np.insert(x, at, y).astype(x.dtype) for x, y in ((run.tokens, odd), (run.sampled, 1)))
    broken = dataclasses.replace(run, tokens=tokens, sampled=sampled)
    others = [r for r in runs if r.domain != run.domain]
    data, _, shares = batch_of([broken, *others], setting, dict.fromkeys(setting.domains, stranger))
    count = sampled.sum()
    assert shares[f"align/masked/{run.domain}"] == pytest.approx(1 / count)
    mask = np.asarray(data["batch"].mask)[0]
    assert mask[at - 1] == 0 and mask.sum() == count - 1
    cut = 20
    assert run.sampled[:cut].any() and run.sampled[cut + 1 :].any()
    short = dataclasses.replace(CFG, teacher_max_length=cut)
    data, _, shares = batch_of([run, *others], setting, dict.fromkeys(setting.domains, stranger), short)
    read = run.sampled[: cut + 1].sum()  # the last token that is read says what the next one is
    assert shares[f"align/masked/{run.domain}"] == pytest.approx(1 - read / run.sampled.sum())
    assert np.asarray(data["batch"].mask)[0].sum() == read


def test_a_run_that_the_teachers_template_refuses_is_masked_and_a_template_that_refuses_all_is_an_error(setting, stranger, runs):
    template = (
        "{% for m in messages %}{% if '~' in m.content %}{{ raise_exception('no ~ here') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    strict = dataclasses.replace(stranger, tokenizer=stranger.tokenizer.with_template(template))
    first, second = (r for r in runs if r.domain == setting.domains[0])
    results = [n for n, m in enumerate(second.trajectory.messages) if m["role"] == "tool"]
    messages = [{**m, "content": m["content"] + "~" * (n == results[0])} for n, m in enumerate(second.trajectory.messages)]
    second = dataclasses.replace(second, trajectory=dataclasses.replace(second.trajectory, messages=tuple(messages)))
    scorers, _ = scoring.make_scorers({"search": strict}, setting.tokenizer, CFG.k, 256, False, False, 96)

    def score(*some):
        placed = distill.pack_domain(list(some), 0, 2, 96)
        return scorers["search"].score(placed, jax.tree.map(jnp.asarray, placed.batch))

    batch, _, shares = score(first, second)
    start, stop = views.turns(second.sampled)[0]
    assert 0 < stop - start < second.sampled.sum()
    seen = first.sampled.sum() + stop - start  # what it wrote before the result that the template refuses is compared
    assert np.asarray(batch.mask).sum() == seen and shares["align/refused"] == 0.5
    assert shares["align/masked"] == pytest.approx(1 - seen / (first.sampled.sum() + second.sampled.sum()))
    with pytest.raises(DataError, match="cannot read any of the student's 1 runs: .*no ~ here"):
        score(second)


def test_a_run_with_a_stranger_resumes_bitwise(setting, models, stranger, monkeypatch, elsewhere):
    teachers = {setting.domains[0]: stranger, setting.domains[1]: scoring.Teacher(models[1], setting.model, setting.tokenizer)}
    cfg = dataclasses.replace(CFG, coverage_every=2)
    whole, here = distill.run(cfg, models[0], teachers, setting, "whole"), elsewhere(setting, "cut")
    original = distill.OnPolicy.next

    def interrupted(self, state):
        if int(state.step) == 2:
            raise KeyboardInterrupt
        return original(self, state)

    monkeypatch.setattr(distill.OnPolicy, "next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill.run(cfg, models[0], teachers, here, "whole")
    monkeypatch.undo()
    resumed = distill.run(cfg, models[0], teachers, here, "whole")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), whole, resumed))
    from a1jax import metrics

    lines = [line for line in metrics.read(setting.workdir) if line["stage"] == "whole"]
    assert ["distill/coverage" in line for line in lines] == [True, False, True]
    assert all(line["align/positions"] > 0 and "align/masked" in line for line in lines)


def stored(model, folder):
    """A parameters folder of random parameters."""
    checkpoint.save_params(folder / "params", jax.tree.map(jnp.asarray, _init(model)))
    folders.write_model(folder, model, {})
    return str(folder)


def test_a_checkpoint_teaches_and_what_does_not_fit_is_refused(setting, models, order, tmp_path):
    student = (setting.model, setting.tokenizer)
    wide = dataclasses.replace(setting.model, d_model=24, vocab_size=650, tie_embeddings=False)
    source = stored(wide, tmp_path)
    found = scoring.open_checkpoint(scoring.Checkpoint(source), student)
    assert found.vocab_map is None and found.model == dataclasses.replace(wide, vocab_size=640)  # the same tokens: padding is left out
    assert {found.params[name].shape for name in ("embed_tokens", "lm_head")} == {(640, 24)}
    found = scoring.open_checkpoint(scoring.Checkpoint(source, alignment="two_sided"), student)
    assert found.model == wide and (found.vocab_map.unit_of_teacher[: setting.tokenizer.vocab_size] >= 0).mean() > 0.99
    assert scoring.open_teacher(found.params, wide, shuffled(setting.tokenizer, order), student).vocab_map.mode == "two_sided"
    for source, message in (
        (scoring.Checkpoint(str(tmp_path / "no")), "no such folder"),
        (scoring.Checkpoint(str(tmp_path), tokenizer=str(tmp_path / "none.model")), "teacher's tokenizer: no tokenizer file"),
        (scoring.Checkpoint(str(tmp_path), alignment="both"), "alignment mode is 'both'"),
    ):
        with pytest.raises(ConfigError, match=message):
            scoring.open_checkpoint(source, student)
    with pytest.raises(ConfigError, match="has 640 ids, its model 600"):
        scoring.open_teacher(models[1], dataclasses.replace(setting.model, vocab_size=600), setting.tokenizer, student)
    with pytest.raises(ConfigError, match="identity needs one tokenizer"):
        scoring.open_teacher(models[1], setting.model, shuffled(setting.tokenizer, order), student, "identity")


def test_a_stage_of_another_run_is_read_with_the_tokenizer_of_that_run(setting, tmp_path):
    student = (setting.model, setting.tokenizer)
    folder = tmp_path / "stages" / "sft"
    folder.mkdir(parents=True)
    source = scoring.Checkpoint(stored(setting.model, folder))
    assert scoring.open_checkpoint(source, student).tokenizer is setting.tokenizer  # that run has none of its own
    path = tmp_path / "tokenizer.model"
    train_sentencepiece(
        experts.tokenizer_texts(tuple(QUICKSTART.values()), 1),
        path,
        vocab_size=600,
        symbols=cross_tokenizer.digits(tuple(QUICKSTART.values())),
    )
    found = scoring.open_checkpoint(source, student)
    assert found.tokenizer.path == str(path) and found.vocab_map.mode == "two_sided"
    shutil.copy(path, folder / "tokenizer.model.v3")  # a name that Mistral's have; what lies in the folder comes first
    assert scoring.open_checkpoint(source, student).tokenizer.path == str(folder / "tokenizer.model.v3")
    mesh = sharding.make_mesh({"fsdp": 2}, jax.devices()[:2])
    found = scoring.open_checkpoint(source, student, mesh)
    assert found.vocab_map is not None and found.params["embed_tokens"].sharding.spec == jax.P(None, "fsdp")


def test_a_checkpoint_of_the_same_tokenizer_scores_on_a_mesh(setting, runs, tmp_path):
    student, model = (setting.model, setting.tokenizer), dataclasses.replace(setting.model, d_model=24)
    source = scoring.Checkpoint(stored(model, tmp_path))
    mesh = sharding.make_mesh({"fsdp": 2}, jax.devices()[:2])
    placed = distill.pack_domain(runs[:2], 0, 2, 96)
    out = []
    for where in (None, mesh):
        teacher = scoring.open_checkpoint(source, student, where)
        scorers, _ = scoring.make_scorers({"search": teacher}, setting.tokenizer, CFG.k, 256, False, False, 96)
        here = dataclasses.replace(setting, mesh=where)
        with here.on_mesh():
            out.append(scorers["search"].score(placed, here.put(jax.tree.map(jnp.asarray, placed.batch)))[1])
    np.testing.assert_array_equal(out[1]["support"], out[0]["support"])
    np.testing.assert_allclose(out[1]["teacher_logits"], out[0]["teacher_logits"], atol=2e-5)


def test_sampled_at_another_temperature_is_refused():
    with pytest.raises(ConfigError, match="drawn at temperature 1, and limits.temperature is 0.7"):
        DistillConfig(mode="sampled", limits=dataclasses.replace(LIMITS, temperature=0.7), max_length=96)


def _init(model):
    from a1jax import params

    return params.init(transformer.specs(model), jax.random.key(0))
