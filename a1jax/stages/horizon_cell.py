"""One cell of the ablation of horizon against parameters: a model trained on pieces of at most H tokens, judged on tasks of all lengths.

All cells of a seed draw from the same runs in the same order of lengths (the curriculum's phases): they differ in the model, in where the
runs are cut, and in how many steps the budget buys; how often they see each run follows from that. All are judged on whole runs, however
short what they were trained on: the worth of a horizon has both in it, what is learnt and getting along at lengths never seen. Budgets:
"tokens", the same number of training tokens; "flops", the same number of training FLOPs, namely what the tokens cost the reference model
at the reference horizon.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .. import metrics
from ..config import ConfigError
from ..data import pieces
from ..data import tokenizer as tokenizers
from ..data.packing import Example, plan
from ..data.pieces import Piece
from ..data.tokenizer import Tokenizer
from ..domains import Domain, feedback
from ..models import flops, transformer
from ..models.config import ModelConfig
from ..rollout.agent import Engine, Limits
from ..types import FINISHED, Params, TrainState, Trajectory
from . import experts, sft
from .pipeline import TokenizerConfig
from .setting import Setting

Budget = Literal["tokens", "flops"]


@dataclasses.dataclass(frozen=True)
class HorizonCell:
    """domains: all their families' tasks, numbered in this order."""

    model: ModelConfig
    horizon: int  # H: tokens of one run that a piece may have
    families: dict[str, Domain]  # domain -> what its tasks are drawn from
    runs: dict[int, int]  # steps -> expert runs of each domain, the same for all cells of a seed
    sft: sft.SftConfig  # steps, rows and max_length follow from the budget and ``slots``; its phases are the curriculum
    tokens: int  # of training: the budget "tokens"
    heldout: dict[int, int]  # steps -> held-out tasks of each domain
    limits: Limits  # budgets of the evaluation
    tokenizer: TokenizerConfig = TokenizerConfig()
    arm: pieces.Arm = "consults"
    budget: Budget = "tokens"
    reference: ModelConfig | None = None  # whose FLOPs for ``tokens`` are the budget "flops"
    reference_horizon: int = 0  # and at which horizon
    seed: int = 0  # of parameters, runs and their order
    slots: int = 1024  # tokens per training step: rows x row length
    row_lengths: tuple[int, ...] = (256, 512, 1024)  # rows are as long as the first of these that holds a piece
    split: Literal["heldout", "admission"] = "heldout"  # admission: other tasks, to choose settings by

    def __post_init__(self):
        if self.horizon > max(self.row_lengths):
            raise ConfigError(f"HorizonCell.horizon is {self.horizon}; the longest of row_lengths {self.row_lengths} must hold a piece")
        if self.budget == "flops" and (self.reference is None or self.reference_horizon < 1):
            raise ConfigError("HorizonCell.budget is 'flops'; name the reference and reference_horizon whose FLOPs are meant")

    @property
    def row_length(self) -> int:
        return min(n for n in self.row_lengths if n >= self.horizon)


@dataclasses.dataclass(frozen=True)
class Material:
    """What one phase of the curriculum trains on, on average. tokens: of a step. supervised: share of tokens that the model wrote.
    length: of attention's cost, see pieces.square_length."""

    share: float
    tokens: float
    supervised: float
    length: float

    def flops(self, model: ModelConfig) -> float:
        """Per token, forward and backward; the output matrix only for tokens with a loss."""
        return flops.training(model, max(1, round(self.length)), self.supervised, 2 * self.supervised).model


def run(cell: HorizonCell, axes: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """Trains and judges; what ``sweep`` writes of it. Goes on from the last checkpoint in ``workdir``."""
    del axes
    tokenizer = open_tokenizer(tuple(cell.families.values()), cell.tokenizer)
    cut = cut_runs(cell, tokenizer)
    materials = [material(cell, cut, phase) for phase in phases_of(cell)]
    stage = dataclasses.replace(cell.sft, steps=steps_of(cell, tokenizer, materials), **shape(cell))
    with metrics.Writer(workdir) as writer:
        setting = Setting(cell.model, tokenizer, tuple(cell.families), None, workdir, writer, cell.seed, families=cell.families)
        data = [(steps, piece.example) for steps, piece in cut]
        began = time.perf_counter()
        params = sft.run(stage, setting.init_params(), sft.Curriculum(stage, data, setting), setting)
        trained = time.perf_counter() - began
    began = time.perf_counter()
    tasks = judge(cell, params, tokenizer)
    judged = time.perf_counter() - began
    tokens = spent(stage, data, setting)
    total, active = transformer.parameter_counts(cell.model)
    won = sum(task["success"] for task in tasks) / max(1, len(tasks))
    return {
        "parameters": {"total": total, "active": active, "active_without_embedding": active - cell.model.vocab_size * cell.model.d_model},
        "train": {
            "steps": stage.steps,
            "tokens": sum(tokens),
            "supervised": sum(n * m.supervised for n, m in zip(tokens, materials, strict=True)),  # tokens that are targets
            "flops": sum(n * m.flops(cell.model) for n, m in zip(tokens, materials, strict=True)),
            **about_pieces(cut),
            "feedback": mean_feedback(cell, tokenizer),
        },
        "tasks": tasks,
        "curves": curves(workdir),
        "seconds": {"train": trained, "evaluate": judged},
        "summary": f"success {100 * won:.1f} %, {sum(tokens)} tokens, training {trained:.0f} s, judging {judged:.0f} s",
    }


def shape(cell: HorizonCell) -> dict[str, int]:
    return {"rows": max(1, cell.slots // cell.row_length), "max_length": cell.row_length}


def phases_of(cell: HorizonCell) -> tuple[sft.Phase, ...]:
    return cell.sft.phases or (sft.Phase(1.0, max(cell.runs)),)


def cut_runs(cell: HorizonCell, tokenizer: Tokenizer) -> list[tuple[int, Piece]]:
    """(steps of the run, piece) of all runs of a seed, cut at the cell's horizon. Raises ConfigError where nothing is left."""
    out = []
    for index, family in enumerate(cell.families.values()):
        for steps, _, example in pool(family, index, tuple(sorted(cell.runs.items())), cell.seed, tokenizer):
            out += [(steps, piece) for piece in pieces.cut(example, cell.horizon, cell.arm)]
    first = phases_of(cell)[0].max_steps
    if not any(steps <= first for steps, _ in out):
        raise ConfigError(f"no run of up to {first} steps has at most {cell.horizon} tokens: raise the horizon, or cut into consults")
    return out


@functools.lru_cache(maxsize=16)
def pool(
    family: Domain, index: int, counts: tuple[tuple[int, int], ...], seed: int, tokenizer: Tokenizer
) -> list[tuple[int, Trajectory, Example]]:
    """The finite expert runs of a seed, each with its steps and its tokens; kept, as the cells of a process share them."""
    runs = experts.expert_runs(family, experts.Runs(dict(counts)), "sft", seed)
    return [(steps, run, experts.example(run, index, tokenizer, show_tools=False)) for steps, run in runs]


@functools.lru_cache(maxsize=4)
def open_tokenizer(families: tuple[Domain, ...], cfg: TokenizerConfig) -> Tokenizer:
    """The tokenizer at cfg.path, or one trained on runs of the families: the same in every cell, whichever process runs it."""
    if cfg.path is not None:
        return tokenizers.load(cfg.path)
    texts, symbols = experts.tokenizer_texts(families, 0), experts.symbols(families, cfg.counters)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "tokenizer.model"
        return tokenizers.train_sentencepiece(texts, path, vocab_size=cfg.vocab_size, symbols=symbols)


def material(cell: HorizonCell, cut: Sequence[tuple[int, Piece]], phase: sft.Phase) -> Material:
    """What a phase trains on, its rows packed as the loader packs them."""
    seen = [piece for steps, piece in cut if steps <= phase.max_steps]
    lengths = [len(piece) for piece in seen]
    _, report = plan(lengths, cell.row_length, "drop")
    written = sum(float(piece.example.mask[1:].sum()) for piece in seen)
    per_step = report.efficiency * cell.row_length * shape(cell)["rows"]
    return Material(phase.share, per_step, written / max(1, sum(lengths)), pieces.square_length(lengths))


def steps_of(cell: HorizonCell, tokenizer: Tokenizer, materials: Sequence[Material]) -> int:
    """Training steps that the cell's budget buys: as near to it as whole steps come, at least one a phase."""
    if cell.budget == "tokens":
        budget, step = cell.tokens, sum(m.share * m.tokens for m in materials)
    else:
        same = dataclasses.replace(cell, model=cell.reference, horizon=cell.reference_horizon, arm="consults", budget="tokens")
        budget = cell.tokens * flops_per_token([material(same, cut_runs(same, tokenizer), p) for p in phases_of(same)], cell.reference)
        step = sum(m.share * m.tokens * m.flops(cell.model) for m in materials)
    return max(len(materials), round(budget / step))


def flops_per_token(materials: Sequence[Material], model: ModelConfig) -> float:
    """Of training through all phases."""
    tokens = [m.share * m.tokens for m in materials]
    return sum(n * m.flops(model) for n, m in zip(tokens, materials, strict=True)) / sum(tokens)


def spent(stage: sft.SftConfig, data: Sequence[tuple[int, Example]], setting: Setting) -> list[int]:
    """Tokens that the stage trained on, per phase: its batches come once more, as they are a function of data and seed alone."""
    source = sft.Curriculum(stage, data, setting)
    out = [0] * len(source.phases)
    for step in range(stage.steps):
        phase = min(int(np.searchsorted(source.ends, step, side="right")), len(out) - 1)
        out[phase] += source.next(TrainState(np.int32(step), None, None, None))[1]["tokens"]
    return out


def judge(cell: HorizonCell, params: Params, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One record per held-out task. The longest are begun first, so that none is left alone at the end."""
    engine = Engine(cell.model, tokenizer, cell.limits)
    tasks = [t for family in cell.families.values() for t in experts.tasks(family, cell.heldout, cell.split, 0)]
    order = sorted(range(len(tasks)), key=lambda i: -tasks[i].steps)
    rollouts, _ = engine.run(params, [tasks[i] for i in order], seed=0)
    by_place = dict(zip(order, rollouts, strict=True))
    return [
        {
            "domain": task.domain,
            "steps": task.steps,
            "task_id": task.task_id,
            "success": int(by_place[i].status == FINISHED and by_place[i].reward >= 1.0),
            "status": by_place[i].status,
            "tokens": len(by_place[i].tokens),
        }
        for i, task in enumerate(tasks)
    ]


def about_pieces(cut: Sequence[tuple[int, Piece]]) -> dict[str, float]:
    """What the cell trains on in the end, when all lengths are in: weighted by piece, not by token."""
    lengths = [len(piece) for _, piece in cut]
    return {
        "pieces": len(cut),
        "longest_piece": max(lengths),
        "mean_piece": sum(lengths) / len(lengths),
        "with_question": sum(piece.question for _, piece in cut) / len(cut),
        "with_turn_before": sum(piece.turn_before for _, piece in cut) / len(cut),
    }


def mean_feedback(cell: HorizonCell, tokenizer: Tokenizer) -> float:
    """Effective feedback (arXiv 2605.29682, see domains/feedback.py) in a piece over what its run has, mean over the pieces: a
    function of the runs, the horizon and the arm, the same for every size and budget."""
    shares = []
    for index, family in enumerate(cell.families.values()):
        for _, run, example in pool(family, index, tuple(sorted(cell.runs.items())), cell.seed, tokenizer):
            whole = feedback.effective(feedback.actions(run), feedback.asked(run), feedback.final_answer(run)).effective
            cut = pieces.cut(example, cell.horizon, cell.arm)
            shares += [feedback.of_piece(run, piece.observations, piece.question, whole).share for piece in cut]
    return sum(shares) / len(shares)


def curves(workdir: pathlib.Path) -> dict[str, list[list[float]]]:
    """Loss and accuracy on the training tokens over the steps."""
    lines = [line for line in metrics.read(workdir) if line["stage"] == "sft"]
    return {name: [[line["step"], round(line[name], 4)] for line in lines if name in line] for name in ("ce/loss", "ce/accuracy")}
