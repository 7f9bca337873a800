"""Under a mesh every array of a run lies as the table says: real ones, of eight devices, before and after steps."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from a1jax import checkpoint, optim, sharding, train
from a1jax import params as param_specs
from a1jax.config import bind
from a1jax.models import transformer
from a1jax.rollout import sampler
from a1jax.rollout.agent import Engine, Limits
from a1jax.stages import distill, folders, scoring, sft
from a1jax.stages.distill import DistillConfig
from a1jax.stages.setting import MeshConfig, make_mesh
from a1jax.stages.sft import SftConfig

SHAPES = [{"slice": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "expert": 2, "context": 2}]
BATCH = [P(("slice", "fsdp"), None), P(("data", "expert"), "context")]


@pytest.fixture(scope="module")
def model(small_model):
    return dataclasses.replace(small_model, num_experts=4)


@pytest.fixture()
def on(setting, model):
    """on(0 or 1, **changes of the model): (setting with a mesh, where its batches lie)."""

    def make(which, **changes):
        mesh = make_mesh(MeshConfig(SHAPES[which]))
        return dataclasses.replace(setting, mesh=mesh, model=dataclasses.replace(model, **changes)), jax.NamedSharding(mesh, BATCH[which])

    return make


def lie_as(tree, places) -> None:
    for (path, x), place in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim), f"{jax.tree_util.keystr(path)}: {x.sharding.spec}, wanted {place.spec}"
        assert x.addressable_shards[0].data.shape == place.shard_shape(x.shape)


def parameters(setting, model=None):
    """Where the table puts every parameter, as partition_spec reads it; some of them by hand."""
    specs = transformer.specs(model or setting.model)
    places = param_specs.shardings(specs, setting.mesh)
    experts, gate = places["blocks"]["0"]["mlp"]["experts"]["down_proj"].spec, places["blocks"]["0"]["mlp"]["gate"].spec
    if "slice" in str(setting.mesh.shape) and setting.mesh.shape["slice"] > 1:
        assert experts == P(None, ("fsdp", "tensor"), None, None) and gate == P(None, "fsdp", None)
        assert places["embed_tokens"].spec == P("tensor", "fsdp")
    else:
        assert experts == P(None, ("expert", "context"), None, None) and gate == P(None, ("expert", "context"), None)
    return places


@pytest.mark.parametrize(
    ("which", "optimizer", "changes"),
    [
        (0, optim.adamw, {"num_layers": 1, "full_attention_interval": 2}),
        (1, optim.muon, {"num_layers": 1, "full_attention_interval": 1}),
        pytest.param(0, optim.muon, {}, marks=pytest.mark.slow),
        pytest.param(1, optim.adamw, {}, marks=pytest.mark.slow),
    ],
)
def test_parameters_and_the_optimizers_state(on, data, which, optimizer, changes):
    """After initialisation, after the first and the second step, and read back: never a copy where a part is meant."""
    setting, where = on(which, **changes)
    places = parameters(setting)
    cfg = SftConfig(steps=2, rows=8, max_length=64, optimizer=bind(optimizer, learning_rate=1e-3), vocab_block=640)
    source = sft.Curriculum(cfg, data, setting)
    with setting.on_mesh():
        state = train.init_state(setting.init_params(), optimizer(setting.specs, 2), 0)
        step = sft.jitted_step(setting.model, 2, cfg.reduction, 640, None, 1, optim.program(cfg.optimizer, 2))
        for at in range(3):
            lie_as(state.params, places)
            found = []
            param_specs.with_owners(lambda x, own: found.append((x, own)), state.opt_state, setting.abstract_params())  # noqa: B023
            moments = [(x, own) for x, own in found if own is not None]
            assert len(moments) >= len(jax.tree.leaves(places))  # every parameter has one at least
            lie_as([x for x, _ in moments], [own.sharding for _, own in moments])
            if at < 2:
                batch, _ = source.next(state)
                lie_as(batch, jax.tree.map(lambda _: where, batch))
                state, out = step(state, batch)
                assert all(x.sharding.is_fully_replicated for x in out.values())
    setting.finish("stage", state.params, {})
    lie_as(setting.finished("stage"), places)


@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_teachers_scores_and_batches_of_distillation(on, tokenizer, which):
    """A frozen teacher of another width, read from its folder; what it says lies beside the student's batch."""
    setting, where = on(which)
    theirs = dataclasses.replace(setting.model, d_model=32, num_layers=1)
    folder = setting.workdir / "teacher"
    checkpoint.save_params(folder / "params", param_specs.init(transformer.specs(theirs), jax.random.key(1)))
    folders.write_model(folder, theirs, {})
    teacher = scoring.open_checkpoint(scoring.Checkpoint(str(folder)), (setting.model, tokenizer), setting.mesh)
    lie_as(teacher.params, parameters(setting, theirs))
    limits = Limits(slots=4, max_turns=1, max_turn_tokens=4, max_length=64)
    cfg = DistillConfig(prompts=2, lengths=(1,), rows=4, max_length=64, k=4, limits=limits, vocab_block=640)
    scorers, _ = scoring.make_scorers(dict.fromkeys(setting.domains, teacher), tokenizer, 4, 640, False, False, 64)
    source = distill.OnPolicy(cfg, setting, Engine(setting.model, tokenizer, limits), scorers)
    with setting.on_mesh():
        state = train.init_state(setting.init_params(), optim.adamw(setting.specs, 1), 0)
        data, _ = source.next(state)
    assert data["support"].shape == (8, 64, 4)
    for x in jax.tree.leaves(data):
        lie_as([x], [jax.NamedSharding(setting.mesh, P(*where.spec, *[None] * (x.ndim - 2)))])


@pytest.mark.parametrize(("which", "fed"), [pytest.param(0, True, marks=pytest.mark.slow), (1, False)])
def test_decoding_caches(on, which, fed):
    """Also before the first token: a cache that began as a copy on every device would decide how long a run may be."""
    setting, _ = on(which)
    sliced = setting.mesh.shape["slice"] > 1
    rows, kv, length = (("slice", "fsdp"), "tensor", None) if sliced else (("data", "expert"), None, "context")
    with setting.on_mesh():
        params = sampler.make_unstack(setting.model)(setting.init_params())
        slots = sampler.open_slots(setting.model, 8, 64)
        advance = sampler.make_advance(setting.model, 1.0)
        feed = sampler.make_feed(setting.model, 1.0)
        programs = advance._cache_size()
        for call in (None, advance, *([feed] if fed else []), advance):
            if call is advance:
                some = np.ones(8, bool)
                *out, slots = advance(params, slots, np.zeros(8, np.int32), some, some, np.zeros(8, np.float32))
            elif call is feed:
                rows_fed, lengths, none = np.arange(4, dtype=np.int32), np.full(4, 16, np.int32), np.zeros(4, bool)
                *out, slots = feed(params, slots, rows_fed, np.zeros((4, 16), np.int32), lengths, none, np.zeros(4, np.float32))
            delta, attention = slots[0]["layers"]
            for name, spec in (("k", P(rows, kv, length, None)), ("v", P(rows, kv, length, None))):
                lie_as([attention[name]], [jax.NamedSharding(setting.mesh, spec)])
            lie_as([delta["state"], delta["window"], slots[0]["position"], slots[1]],
                   [jax.NamedSharding(setting.mesh, spec) for spec in (P(rows, kv), P(rows), P(rows), P())])  # fmt: skip
            assert call is None or all(x.sharding.is_fully_replicated for x in out)  # every process reads them
        assert advance._cache_size() == programs + 1  # the cache of the first call lies as that of every other
        text = advance.lower(params, slots, np.zeros(8, np.int32), some, some, np.zeros(8, np.float32)).compile().as_text()
    # No step gathers a cache: slots of 2 heads (one on a device, where tensor cuts them) of 64 places of 8.
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
    assert not [dims for dims in gathered if re.fullmatch(r"\d+,\d+,64,8", dims)], gathered


def test_what_lies_beside_a_batch(on):
    setting, where = on(1)
    values = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    beside = setting.put_tokens(values)
    lie_as([beside], [where])
    np.testing.assert_array_equal(beside, values)
    assert setting.rows_here(8) is None  # one process builds whole batches
    assert sharding.rows_here(setting.mesh, 8) == list(range(8))
