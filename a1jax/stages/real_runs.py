"""SFT on real trajectories: read, count, prepare, pack, train, and measure on runs held out.

Nothing of a held-out run is trained on: the split is by run, fixed by the run's place in the prepared data and the seed.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import distributed, metrics
from ..config import Binding, ConfigError
from ..data import batches, domain_names, packing, prepare
from ..data import tokenizer as tokenizers
from ..data.packing import Example
from ..losses import cross_entropy
from ..models import transformer
from ..models.config import ModelConfig
from ..sharding import flatten_tokens
from ..types import Batch, Metrics, Params
from . import fitting_mesh, folders, sft
from .setting import MeshConfig, Setting, make_mesh


@dataclasses.dataclass(frozen=True)
class DataConfig:
    paths: tuple[str, ...]  # files, folders or globs of trajectories, in any of the formats a1jax.data.trajectories reads
    tokenizer: str  # a tokenizer.json (also .xz), a SentencePiece model, or a folder with one
    strict: bool = False  # True: stop at the first record that cannot be used, instead of counting it
    heldout: float = 0.05  # share of the runs that are never trained on
    heldout_rows: int = 2  # packed rows of held-out runs that the loss is measured on


@dataclasses.dataclass(frozen=True)
class RealRuns:
    """An SFT run on trajectory files."""

    name: str  # default run directory: runs/<name>
    main: Binding  # what a run does with this config: a function of (cfg, workdir)
    data: DataConfig
    model: ModelConfig  # vocab_size must be at least the tokenizer's
    sft: sft.SftConfig
    probe_every: int = 5  # steps between measurements of the held-out loss
    mesh: MeshConfig = MeshConfig()
    seed: int = 0  # of parameters, order and split
    initial: str = ""  # a parameters folder (of `a1jax import`, of a stage) that training starts from; empty: random parameters

    def __post_init__(self):
        if not 0.0 < self.data.heldout < 1.0:
            raise ConfigError(f"data.heldout is {self.data.heldout}; it is a share of the runs, between 0 and 1")


class Subset:
    """Some of a source's examples, still read when asked for."""

    def __init__(self, source: Any, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.lengths = np.asarray(source.lengths)[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Example:
        return self.source[int(self.indices[i])]


def split(source: Any, share: float, seed: int) -> tuple[Subset, Subset]:
    """(training, held-out): a random ``share`` of the runs, at least one, is held out."""
    order = np.random.default_rng(seed).permutation(len(source))
    n = max(1, round(share * len(source)))
    return Subset(source, np.sort(order[n:])), Subset(source, np.sort(order[:n]))


def heldout_batch(source: Subset, rows: int, max_length: int) -> Batch:
    """The fullest ``rows`` rows of held-out runs, packed like the training data."""
    packed, _ = packing.pack([source[i] for i in range(len(source))], max_length)
    return packing.to_batch(packed[:rows], max_length)


@functools.partial(jax.jit, static_argnames=("model", "block"))
def heldout_loss(params: Params, batch: Batch, model: ModelConfig, block: int) -> jax.Array:
    """Mean cross-entropy (nats) per model-written token."""
    hidden, _ = transformer.apply(params, batch.tokens, batch.positions, batch.segment_ids, model)
    weights = batch.mask / jnp.maximum(batch.mask.sum(), 1.0)
    flat, targets, weights = (flatten_tokens(x) for x in (hidden, batch.targets, weights))
    return cross_entropy.blocked_cross_entropy(flat, transformer.unembed(params, model), targets, weights, block, 256)[0]


def run(cfg: RealRuns, workdir: pathlib.Path) -> dict[str, float]:
    """Statistics, packing, training and the held-out loss; returns {"first", "last", "fall", "efficiency"}, of several processes the first
    one; the others {}. Resumable."""
    workdir, mesh = pathlib.Path(workdir), make_mesh(cfg.mesh, fitting_mesh.demands(cfg))
    if cfg.initial:
        folders.check_initial(pathlib.Path(cfg.initial), cfg.model)
    tokenizer = tokenizers.load(cfg.data.tokenizer)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids but model.vocab_size is {cfg.model.vocab_size}; set it to at least that"
        )
    prepared = workdir / "prepared"
    distributed.by_first(
        lambda: (prepared / prepare.REPORT).exists() or prepare.prepare(list(cfg.data.paths), prepared, cfg.data.tokenizer, cfg.data.strict)
    )
    source = prepare.open_prepared(prepared, tokenizer)
    print(source.summary["statistics"])
    train_part, heldout = split(source, cfg.data.heldout, cfg.seed)
    with metrics.Writer(workdir) as writer:
        setting = Setting(cfg.model, tokenizer, domain_names.DOMAINS, mesh, workdir, writer, cfg.seed, cfg.initial)
        loader = batches.loader(
            train_part,
            batch_size=cfg.sft.rows,
            max_length=cfg.sft.max_length,
            seed=cfg.seed,
            policy=cfg.sft.policy,
            pad_id=tokenizer.pad_id,
            places=setting.rows_here(cfg.sft.rows),
        )
        print(f"\npacked to {cfg.sft.max_length:,}: {loader.report}\nheld out: {len(heldout)} runs\n")
        with setting.on_mesh():
            params = setting.init_params()
            batch = setting.put(heldout_batch(heldout, cfg.data.heldout_rows, cfg.sft.max_length))

        def probe(params: Params) -> Metrics:
            return {"heldout/loss": float(heldout_loss(params, batch, cfg.model, cfg.sft.vocab_block))}

        sft.run(cfg.sft, params, sft.Packed(loader, setting), setting, probe=probe, probe_every=cfg.probe_every)
    if not distributed.is_first():
        return {}
    return conclude(workdir, loader.report.efficiency)


def conclude(workdir: pathlib.Path, efficiency: float) -> dict[str, float]:
    """Print how the held-out loss went, from the lines the run wrote."""
    lines = [line for line in metrics.read(workdir) if line["stage"] == "sft/probe"]
    for line in lines:
        print(f"step {line['step']:5d}  held-out loss {line['heldout/loss']:.3f} nats per model token")
    first, last = lines[0]["heldout/loss"], lines[-1]["heldout/loss"]
    print(f"held-out loss fell by {100 * (1 - last / first):.1f} % from its first value")
    return {"first": first, "last": last, "fall": 1 - last / first, "efficiency": efficiency}
