"""A checkpoint of one mesh under others: bitwise the same, and training goes on as it would have."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from a1jax import checkpoint, optim, train
from a1jax.config import bind
from a1jax.stages import sft
from a1jax.stages.setting import MeshConfig, make_mesh

CFG = sft.SftConfig(steps=4, rows=8, max_length=160, optimizer=bind(optim.adamw, learning_rate=1e-2, warmup=0.0, final=1.0),
                    save_every=2, log_every=1, vocab_block=256)  # fmt: skip
SHAPES = ({"expert": 4}, {"fsdp": 2, "context": 2}, {"data": 2, "tensor": 2}, {})


class Cut(Exception):
    pass


def host(tree):
    return [np.asarray(x) for x in jax.tree.leaves(checkpoint._without_keys(tree))]


def test_a_checkpoint_of_eight_devices_goes_on_under_four_and_one(setting, data, monkeypatch):
    model = dataclasses.replace(setting.model, num_layers=1, full_attention_interval=1, num_experts=8)

    def under(shape):
        return dataclasses.replace(setting, model=model, mesh=make_mesh(MeshConfig(shape)))

    def train_on(here, stage):
        source = sft.Curriculum(CFG, data, here)
        with here.on_mesh():
            params = here.init_params()
        return sft.run(CFG, params, source, here, stage), source

    wide = under({"fsdp": 8})
    whole, source = train_on(wide, "whole")
    position = source.get_state()
    following, states = sft.Packed.next, []

    def cut(self, state):
        states.append(host(state))
        if len(states) == 3:
            raise Cut
        return following(self, state)

    monkeypatch.setattr(sft.Packed, "next", cut)
    with pytest.raises(Cut):
        train_on(wide, "four")
    monkeypatch.undo()
    shutil.copytree(wide.directory("four"), wide.directory("one"))
    for shape in SHAPES:
        here = under(shape)
        tx = CFG.optimizer(here.specs, CFG.steps)
        with here.on_mesh():
            template = train.init_state(here.init_params(), tx, 1)
            with checkpoint.open_manager(here.directory("one") / "checkpoints", keep=2, save_every=2) as manager:
                state, extra, step = checkpoint.restore(manager, template)
        assert step == 2 and [phase["batches"] for phase in extra["source"]["phases"]] == [2]
        found = host(state)
        assert len(found) == len(states[2])
        for a, b in zip(found, states[2], strict=True):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
        devices = {len(x.sharding.device_set) for x in jax.tree.leaves(state.params)}
        assert devices == {here.mesh.size if here.mesh is not None else 1}
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(whole)]
    for stage, shape in (("four", {"expert": 4}), ("one", {})):
        here = under(shape)
        resumed, source = train_on(here, stage)
        assert source.get_state() == position
        # Sums in another order: a gradient differs by about sqrt(n) 6e-8 of its size, n <= 8 x 160 tokens, so 2e-6; Adam divides by the
        # gradient's own size, which leaves that but for entries near zero. Ten times this of the way gone, in the norm; measured 2e-7.
        for name, a, b, before in zip(names, host(resumed), host(whole), host(here.init_params()), strict=True):
            moved = np.linalg.norm(b - before)
            assert np.linalg.norm(a - b) <= 2e-5 * moved and moved > 0, (name, np.linalg.norm(a - b) / moved)
