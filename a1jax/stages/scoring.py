"""What a domain's teacher says of the student's runs, as arrays that lie beside the student's batch.

A teacher of the student's own tokenizer reads the student's ids. One of another tokenizer reads its own view of the run, and what it says
is mapped onto the student's vocabulary (``kernels.vocab_align.targets``); positions that cannot be aligned lose their place in the mask,
before any weight is made. Teachers are frozen; they may be of any architecture.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .. import checkpoint
from .. import params as param_specs
from ..align import byte_table, extensions, positions, vocab_map
from ..align.vocab_map import VocabMap
from ..config import ConfigError
from ..data import packing
from ..data import tokenizer as tokenizers
from ..data.errors import DataError
from ..data.tokenizer import Tokenizer
from ..kernels import vocab_align
from ..losses import distill as distill_loss
from ..models import transformer
from ..models.config import ModelConfig
from ..sharding import constrain, flatten_tokens, is_sharded, put_batch, shards, unflatten_tokens
from ..types import Batch, Metrics, Params, Rollout
from . import folders, full, views

Scores = dict[str, Any]
"""float32 [B, T, K] "teacher_logits" at int32 [B, T, K] "support"; float32 [B, T] "teacher_logsumexp"; where any teacher has another
tokenizer also int32 [B, T] "alone"; in mode "sampled" only float32 [B, T] "score": log-probability of the token that was written; in
mode "full" what ``full.native`` or ``full.aligned`` says."""


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """params as of ``model``; vocab_map: from its tokenizer onto the student's, None where they are the same."""

    params: Params
    model: ModelConfig
    tokenizer: Tokenizer
    vocab_map: VocabMap | None = None


def open_teacher(
    params: Params, model: ModelConfig, tokenizer: Tokenizer, student: tuple[ModelConfig, Tokenizer], alignment: str = ""
) -> Teacher:
    """The teacher, with the map that its tokenizer needs; alignment as in ``vocab_map.build``, empty: by the two tokenizers.

    A teacher of the student's tokenizer whose matrices are padded to more rows loses the rows that the student has not.
    Raises ConfigError where a tokenizer has more ids than its model, or the alignment does not suit them.
    """
    tables = []
    for side, (cfg, own) in (("student", student), ("teacher", (model, tokenizer))):
        if own.vocab_size > cfg.vocab_size:
            raise ConfigError(
                f"the {side}'s tokenizer {own.path} has {own.vocab_size} ids, its model {cfg.vocab_size}: they do not belong together"
            )
        tables.append(byte_table.of(own, cfg.vocab_size))
    rows = student[0].vocab_size
    if alignment in ("", "identity") and model.vocab_size > rows and byte_table.of(tokenizer).hash == byte_table.of(student[1]).hash:
        names = ("embed_tokens",) if model.tie_embeddings else ("embed_tokens", "lm_head")
        params = {**params, **{name: params[name][:rows] for name in names}}
        return Teacher(params, dataclasses.replace(model, vocab_size=rows), tokenizer)
    made = vocab_map.build(*tables, alignment or None)
    return Teacher(params, model, tokenizer, None if made.mode == "identity" else made)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A teacher that exists already, instead of one that stage 2 makes."""

    params: str  # a parameters folder, of `a1jax import` or of a stage
    tokenizer: str = ""  # the one it was trained with; empty: the one in that folder, of a stage its run's; where none is, the student's
    alignment: str = ""  # identity, two_sided, one_sided or shared; empty: identity where the tokenizers are the same, else two_sided


def open_checkpoint(source: Checkpoint, student: tuple[ModelConfig, Tokenizer], mesh: Mesh | None = None) -> Teacher:
    """The teacher of a checkpoint, of any architecture, read where it will lie.

    Raises ConfigError where its folder or tokenizer is missing or does not fit, and as ``check_mesh``."""
    folder = pathlib.Path(source.params)
    model, _ = folders.read_model(folder)
    path = source.tokenizer or _tokenizer_of(folder)
    try:
        tokenizer = tokenizers.load(path) if path else student[1]
    except DataError as error:
        raise ConfigError(f"the teacher's tokenizer: {error}") from None
    specs = transformer.specs(model)
    shapes = param_specs.abstract(specs)
    if mesh is not None:
        placed = param_specs.shardings(specs, mesh)
        shapes = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)
    teacher = open_teacher(checkpoint.load_params(folder / "params", shapes), model, tokenizer, student, source.alignment)
    check_mesh(teacher, mesh, source.params)
    return teacher


def check_mesh(teacher: Teacher, mesh: Mesh | None, name: str) -> None:
    """Raises ConfigError for a teacher of another tokenizer under a mesh of several processes: which rows are compared is found out on the
    host from all runs, and a process has at hand what its own devices hold."""
    if teacher.vocab_map is not None and mesh is not None and mesh.is_multi_process:
        raise ConfigError(
            f"distill: the teacher {name} has another tokenizer and the mesh spans several processes, each with a part of the runs "
            "to align: use the devices of one process"
        )


def _tokenizer_of(folder: pathlib.Path) -> str:
    """Path of the tokenizer that lies in a parameters folder, or in the run that a stage's folder belongs to; empty for none."""
    patterns = ("tokenizer.json*", "*.model", "*.model.v*", "*.tiktoken")
    if any(any(folder.glob(pattern)) for pattern in patterns):
        return str(folder)
    stages = folder.resolve().parent
    trained = stages.parent / "tokenizer.model"  # of runs/<name>/stages/<stage>
    return str(trained) if stages.name == "stages" and trained.is_file() else ""


@dataclasses.dataclass(frozen=True)
class Placed:
    """The runs of one domain packed: runs[n] stands in row n of ``row`` from ``start`` on; left_out: runs that found no room."""

    batch: Batch
    runs: tuple[Rollout, ...]
    row: tuple[int, ...]
    start: tuple[int, ...]
    left_out: int


def native(teacher: Params, batch: Batch, model: ModelConfig, k: int, block: int) -> Scores:
    """A teacher's k best ids at every position. It chooses its own experts: the routes in the batch are the student's."""
    hidden, _ = transformer.apply(teacher, batch.tokens, batch.positions, batch.segment_ids, model)
    found = distill_loss.teacher_targets(flatten_tokens(hidden), transformer.unembed(teacher, model), k, block)
    names = {"support": found.support, "teacher_logits": found.logits, "teacher_logsumexp": found.logsumexp}
    return {name: unflatten_tokens(x, *batch.tokens.shape) for name, x in names.items()}


def written(teacher: Params, batch: Batch, model: ModelConfig, block: int) -> Scores:
    """The teacher's log-probability of every target."""
    hidden, _ = transformer.apply(teacher, batch.tokens, batch.positions, batch.segment_ids, model)
    hidden, unembed = flatten_tokens(hidden), transformer.unembed(teacher, model)
    logits = vocab_align.gather_logits(hidden, unembed, flatten_tokens(batch.targets)[:, None])[:, 0]
    return {"score": unflatten_tokens(logits - vocab_align.logsumexp(hidden, unembed, block), *batch.tokens.shape)}


@functools.lru_cache(maxsize=16)
def jitted(form, **static):
    """One compiled program per form and static arguments, whoever asks: teachers of one architecture share it."""
    return jax.jit(functools.partial(form, **static))


def score_step(model: ModelConfig, k: int, block: int, sampled: bool, everything: bool):
    """The jitted score(teacher's parameters, batch) -> Scores of a teacher of the student's tokenizer, by the mode of the loss."""
    if sampled:
        return jitted(written, model=model, block=block)
    return jitted(full.native, model=model) if everything else jitted(native, model=model, k=k, block=block)


class Scorer:
    """One teacher, ready to score batches. fold: the number of its map among those of ``members``, see ``make_scorers``."""

    def __init__(
        self,
        teacher: Teacher,
        student: Tokenizer,
        k: int,
        block: int,
        sampled: bool,
        foreign: bool,
        fold: int,
        show_tools: bool,
        max_length: int,
        everything: bool = False,
    ):
        self.everything = everything
        self.teacher, self.student, self.k, self.block = teacher, student, k, block
        self.sampled, self.foreign, self.fold, self.show_tools, self.max_length = sampled, foreign, fold, show_tools, max_length
        self.tables = None if teacher.vocab_map is None else positions.tables(teacher.vocab_map)

    def score(self, placed: Placed, batch: Batch) -> tuple[Batch, Scores, Metrics]:
        """(the batch, its mask without positions that have no target; scores; shares). batch: ``placed.batch`` where it lies."""
        if self.teacher.vocab_map is not None:
            return self._aligned(placed, batch)
        step = score_step(self.teacher.model, self.k, self.block, self.sampled, self.everything)
        scores = step(self.teacher.params, batch)
        if self.foreign and not (self.sampled or self.everything):  # another domain's teacher brings one more place
            shift = self.fold * self.teacher.model.vocab_size
            scores["support"] = jnp.pad(scores["support"] + shift, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
            scores["teacher_logits"] = jnp.pad(scores["teacher_logits"], ((0, 0), (0, 0), (0, 1)), constant_values=-jnp.inf)
            scores["alone"] = jnp.full(batch.tokens.shape, -1, jnp.int32)
        return batch, scores, {}

    def _aligned(self, placed: Placed, batch: Batch) -> tuple[Batch, Scores, Metrics]:
        teacher, shape = self.teacher, placed.batch.tokens.shape
        read = views.view_all(placed.runs, self.student, teacher.tokenizer, self.show_tools)
        refused = [view.refused for view in read if view.refused]
        if refused and len(refused) == len(read):
            raise DataError(f"a teacher cannot read any of the student's {len(read)} runs: {refused[0]}")
        theirs, row, start = _pack(read, self.max_length)
        turns = list(_turns(placed, read, row, start, shape[1], theirs.tokens.shape[1], self.max_length))
        at = positions.positions(turns, teacher.vocab_map)
        if is_sharded():
            theirs = put_batch(theirs, jax.sharding.get_mesh())
        hidden = jitted(_hidden, model=teacher.model)(teacher.params, theirs)
        unembed = transformer.unembed(teacher.params, teacher.model)
        found = vocab_align.aligned_targets(hidden, unembed, self.tables, at, 1 if self.everything else self.k, shape[0] * shape[1])
        mask = np.array(placed.batch.mask)
        mask.reshape(-1)[at.masked] = 0.0
        report = at.report()
        shares = {f"align/{name}": value for name, value in report.items()}
        shares["align/refused"] = len(refused) / max(len(read), 1)
        batch = dataclasses.replace(batch, mask=_beside(jnp.asarray(mask.reshape(-1)), shape))
        if self.everything:
            return batch, full.aligned(at, teacher.vocab_map, hidden, found, *shape), shares
        if self.sampled:
            return batch, {"score": _beside(found.score, shape)}, shares
        shift = self.fold * len(teacher.vocab_map.unit_of_student)
        scores = {
            "support": jnp.where(found.units >= 0, found.units + shift, -1),
            "teacher_logits": found.values,
            "teacher_logsumexp": jnp.zeros(found.alone.shape),
            "alone": found.alone,
        }
        return batch, {name: _beside(x, shape) for name, x in scores.items()}, shares


def make_scorers(
    teachers: dict[str, Teacher],
    student: Tokenizer,
    k: int,
    block: int,
    sampled: bool,
    show_tools: bool,
    max_length: int,
    everything: bool = False,
) -> tuple[dict[str, Scorer], Any]:
    """(domain -> scorer, ``members`` of all their maps for the loss, None where all tokenizers are the student's)."""
    folds: list[np.ndarray] = []
    number: dict[str, int] = {}
    keys: dict[Any, int] = {}
    foreign = any(t.vocab_map is not None for t in teachers.values())
    size = next((len(t.vocab_map.unit_of_student) for t in teachers.values() if t.vocab_map is not None), 0)
    for domain, teacher in teachers.items():
        made = teacher.vocab_map
        key = None if made is None else (made.mode, made.student_hash, made.teacher_hash)
        if key not in keys:
            keys[key] = len(folds)
            folds.append(np.arange(size, dtype=np.int32) if made is None else made.unit_of_student)
        number[domain] = keys[key]
    scorers = {
        domain: Scorer(teacher, student, k, block, sampled, foreign, number[domain], show_tools, max_length, everything)
        for domain, teacher in teachers.items()
    }
    if not foreign or sampled or everything:
        return scorers, None
    # By the student's own bytes: what is text and what a control token differs from pair to pair.
    order = extensions.by_bytes(byte_table.of(student, size).bytes)
    return scorers, vocab_align.members.members(folds, prefixes=order)


def _hidden(teacher: Params, batch: Batch, model: ModelConfig) -> jax.Array:
    """[B * T, D], row after row also where the rows' length is cut, because positions are counted so; under a mesh on every device."""
    hidden, _ = transformer.apply(teacher, batch.tokens, batch.positions, batch.segment_ids, model)
    return constrain(hidden, None, None, None).reshape(-1, hidden.shape[-1])


def _beside(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[B * T, ...], row after row, as [B, T, ...] where a batch lies."""
    return constrain(x.reshape(*shape, *x.shape[1:]), "batch", "length", *[None] * (x.ndim - 1))


def _pack(read: Sequence[views.View], max_length: int) -> tuple[Batch, list[int], list[int]]:
    """The views, longer ones cut to max_length, packed into rows of that length, and where each stands. Rows in steps of 4: few programs
    are compiled. Under a mesh as many more rows, and as much more length, as it takes to cut both evenly."""
    steps, width = math.lcm(4, shards("batch", 0)), -(-max_length // shards("length", 0)) * shards("length", 0)
    cut = [packing.Example(v.tokens[:max_length], np.zeros(min(len(v.tokens), max_length), np.float32)) for v in read]
    placed = packing.best_fit_decreasing([len(e) for e in cut], width)
    row, start = [0] * len(cut), [0] * len(cut)
    for number, members in enumerate(placed):
        at = 0
        for i in members:
            row[i], start[i] = number, at
            at += len(cut[i])
    rows = [tuple(cut[i] for i in members) for members in placed]
    return packing.to_batch([*rows, *[()] * (max(steps, -(-len(rows) // steps) * steps) - len(rows))], width), row, start


def _turns(placed: Placed, read: Sequence[views.View], row: Sequence[int], start: Sequence[int], length: int, width: int, limit: int):
    """Every turn with the flat rows that predict its tokens; -1 where the teacher's context was cut at ``limit``. length, width: of the
    student's rows and of the teacher's."""
    for n, (run, view) in enumerate(zip(placed.runs, read, strict=True)):
        for (a, b), (c, d) in zip(view.ours, view.theirs, strict=True):
            ours = placed.row[n] * length + placed.start[n] + np.arange(a, b) - 1
            at = np.arange(c, d) - 1
            theirs = np.where(at < limit, row[n] * width + start[n] + at, -1)
            yield positions.Turn(run.tokens[a:b], view.tokens[c:d], ours, theirs)
