"""One student, teachers of other tokenizers: what vocabulary alignment keeps of what a teacher has to give.

Per seed: a student is trained to the end of stage 1; for every vocabulary a family of teachers learns the same domains in its own
tokens (stages 1 and 2 on the same runs); then every arm distils the same student from one family by one alignment, with the same settings.
Success on held-out tasks is judged for all of them. Resumable at every step; a finished seed leaves one JSON file.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, get_args

from .. import distributed, metrics
from ..align.vocab_map import Mode
from ..config import Binding, ConfigError
from ..data import tokenizer as tokenizers
from ..domains import QUICKSTART, Domain
from ..models.config import ModelConfig
from ..rollout.agent import Engine, Limits
from ..types import Params
from . import distill, evaluate, experts, sft, teacher
from .scoring import open_teacher
from .setting import Setting


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one tokenizer, trained in their own tokens."""

    symbols: Binding  # a function of (families of tasks): strings that get one id each in its SentencePiece vocabulary
    vocab_size: int  # of that vocabulary, and of the models
    sft: sft.SftConfig  # stage 1
    teacher: sft.SftConfig  # stage 2, per domain
    limits: Limits  # budgets of evaluations, in its own tokens


@dataclasses.dataclass(frozen=True)
class Arm:
    """One distillation of the student."""

    family: str  # whose teachers
    alignment: str = ""  # two_sided, one_sided, shared; empty: by the tokenizers
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of DistillConfig that differ


@dataclasses.dataclass(frozen=True)
class CrossTokenizer:
    name: str
    main: Binding  # a function of (cfg, workdir)
    model: ModelConfig  # of all; its vocab_size is each family's own
    domains: tuple[str, ...]
    runs: dict[str, experts.Runs]  # expert data of stage 1, per domain, the same for every family
    extra: dict[str, experts.Runs]  # and of the teachers, which the student never sees
    families: dict[str, Family]  # the first is the student's own
    arms: dict[str, Arm]  # the first is what the others are measured by
    distill: distill.DistillConfig
    evaluation: evaluate.Evaluation
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self):
        for what in ("domains", "families", "arms", "seeds"):
            if not getattr(self, what):
                raise ConfigError(f"{what} is empty; name at least one")
        for name, arm in self.arms.items():
            if arm.alignment not in ("", *get_args(Mode)):
                raise ConfigError(
                    f"arms.{name}.alignment is '{arm.alignment}'; choose one of {', '.join(get_args(Mode))}, or leave it empty"
                )
            if arm.family not in self.families:
                raise ConfigError(f"arms.{name}.family is '{arm.family}'; families are {', '.join(self.families)}")
            unknown = set(arm.settings) - {f.name for f in dataclasses.fields(distill.DistillConfig)}
            if unknown:
                raise ConfigError(f"arms.{name}.settings has '{min(unknown)}', which is no field of DistillConfig")
        for name in self.domains:
            if name not in QUICKSTART:
                raise ConfigError(f"domains has '{name}'; there are {', '.join(sorted(QUICKSTART))}")
            for field in ("runs", "extra"):
                if name not in getattr(self, field):
                    raise ConfigError(f"{field} has nothing for domain '{name}'; it has {', '.join(sorted(getattr(self, field)))}")


def digits(families: Sequence[Domain]) -> list[str]:
    """The symbols of the small vocabulary without those that have a digit: numbers are then written digit by digit."""
    return [symbol for symbol in experts.symbols(families, 0) if not any(c.isdigit() for c in symbol)]


def pieces(families: Sequence[Domain]) -> list[str]:
    """Another cut of the same text: names apart from their signs, call headers in parts, but counters joined with the word before."""
    out = [s for s in experts.SCAFFOLD if s not in ("step", " next", "<tool_call>\n", "\n</think>\n\n")]
    out += ["\n</think>\n\n", '\n</think>\n\n<tool_call>\n{"name": "', '", "arguments": {"', '": "', "@", "$", "#", " next end"]
    out += [f"{word} {i}" for word in ("step", " next") for i in range(1, 25)] + [str(i) for i in range(100)]
    for symbol in experts.symbols(families, 0):
        if symbol[0] in "@$#":
            out.append(symbol[1:])
        elif symbol.startswith("<tool_call>\n{"):
            out += [part for part in symbol.split('"') if part.isidentifier() and part not in ("name", "arguments")]
        elif symbol not in experts.SCAFFOLD:
            out.append(symbol)
    return list(dict.fromkeys(out))


def run(cfg: CrossTokenizer, workdir: pathlib.Path) -> dict[int, dict[str, Any]]:
    """Seed -> what ``run_seed`` returns; finished seeds are read back. Raises ConfigError where there are several processes."""
    if distributed.several():
        raise ConfigError("teachers of other tokenizers are aligned by one process: start this experiment in one")
    workdir = pathlib.Path(workdir)
    return {seed: run_seed(cfg, workdir / f"seed_{seed}", seed) for seed in cfg.seeds}


def run_seed(cfg: CrossTokenizer, workdir: pathlib.Path, seed: int) -> dict[str, Any]:
    """{"scores": {model: {domain: score}}, "align": {arm: shares of positions}, "seconds": ...}, also in ``workdir``/results.json."""
    path = workdir / "results.json"
    if path.exists():
        return json.loads(path.read_text())
    began = time.perf_counter()
    settings: dict[str, Setting] = {}
    models: dict[str, dict[str, Params]] = {}
    scores: dict[str, dict] = {}
    own = next(iter(cfg.families))
    with metrics.Writer(workdir) as writer:
        for name, family in cfg.families.items():
            settings[name] = open_family(cfg, family, workdir / name, writer, seed)
            models[name] = train_family(cfg, family, settings[name], name)
            judged = {f"{name}/{model}": params for model, params in models[name].items()}
            scores |= judge(cfg, settings[name], family.limits, judged, workdir)
        for name, arm in cfg.arms.items():
            student = distil(cfg, arm, settings[own], settings[arm.family], models[own]["sft"], models[arm.family], name)
            scores |= judge(cfg, settings[own], cfg.families[own].limits, {name: student}, workdir)
    lines = metrics.read(workdir)
    align = {name: last_shares(lines, name) for name in cfg.arms}
    results = {"scores": scores, "align": align, "seed": seed, "seconds": time.perf_counter() - began}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1))
    part.rename(path)
    return results


def open_family(cfg: CrossTokenizer, family: Family, workdir: pathlib.Path, writer: metrics.Writer, seed: int) -> Setting:
    """The setting of one tokenizer: its vocabulary is trained on the first seed's texts, so that it is the same for all seeds."""
    path = workdir / "tokenizer.model"
    if path.exists():
        tokenizer = tokenizers.load(path)
    else:
        sources = tuple(drawn_from(cfg).values())
        texts, symbols = experts.tokenizer_texts(sources, 0), family.symbols(sources)
        tokenizer = tokenizers.train_sentencepiece(texts, path, vocab_size=family.vocab_size, symbols=symbols)
    model = dataclasses.replace(cfg.model, vocab_size=family.vocab_size)
    return Setting(model, tokenizer, cfg.domains, None, workdir, writer, seed, families=drawn_from(cfg))


def drawn_from(cfg: CrossTokenizer) -> dict[str, Domain]:
    return {d: QUICKSTART[d] for d in cfg.domains}


def train_family(cfg: CrossTokenizer, family: Family, setting: Setting, name: str) -> dict[str, Params]:
    """ "sft" and a teacher per domain, by name."""
    data, extra = (
        {d: experts.examples(QUICKSTART[d], i, runs[d], use, setting.seed, setting.tokenizer, False) for i, d in enumerate(cfg.domains)}
        for runs, use in ((cfg.runs, "sft"), (cfg.extra, "teacher"))
    )
    mixed = [pair for d in cfg.domains for pair in data[d]]
    made = {"sft": sft.run(family.sft, setting.init_params(), sft.Curriculum(family.sft, mixed, setting), setting, f"{name}_sft")}
    for d in cfg.domains:
        source = sft.Curriculum(family.teacher, [*data[d], *extra[d]], setting)
        made[teacher.stage_name(d)] = sft.run(family.teacher, made["sft"], source, setting, f"{name}_{teacher.stage_name(d)}")
    return made


def distil(
    cfg: CrossTokenizer, arm: Arm, student: Setting, theirs: Setting, params: Params, models: dict[str, Params], name: str
) -> Params:
    """The student after the arm's distillation."""
    sides = (theirs.model, theirs.tokenizer, (student.model, student.tokenizer), arm.alignment)
    made = {d: models[teacher.stage_name(d)] for d in cfg.domains}
    first = open_teacher(made[cfg.domains[0]], *sides)  # one map for all: it is the same, and what is computed of it is kept
    teachers = {d: dataclasses.replace(first, params=params_of_d) for d, params_of_d in made.items()}
    return distill.run(dataclasses.replace(cfg.distill, **arm.settings), params, teachers, student, name)


def judge(cfg: CrossTokenizer, setting: Setting, limits: Limits, models: dict[str, Params], workdir: pathlib.Path) -> dict[str, dict]:
    engine = Engine(setting.model, setting.tokenizer, limits)
    out = {}
    for name, params in models.items():
        path = workdir / f"evaluations/{name.replace('/', '_')}.json"
        out[name] = evaluate.run(cfg.evaluation, params, engine, setting.families, name, path)
    return out


def last_shares(lines: list[dict[str, Any]], stage: str) -> dict[str, float]:
    """Means over a stage's steps of the shares of positions that it reports."""
    own = [line for line in lines if line["stage"] == stage]
    names = {n for line in own for n in line if n.startswith("align/")}
    return {n: sum(line[n] for line in own if n in line) / max(1, sum(n in line for line in own)) for n in sorted(names)}
