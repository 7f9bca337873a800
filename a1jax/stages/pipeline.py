"""The three stages in a row, with their controls and their judgement: 1 -> 2 -> 3, resumable at every step and at every border.

Every finished stage leaves its parameters, every evaluation its JSON; starting again reads what is there and goes on with what is not.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

from .. import distributed, metrics
from ..config import Binding, ConfigError
from ..data import tokenizer as tokenizers
from ..domains import DOMAINS, Domain
from ..models import transformer
from ..models.config import ModelConfig
from ..rollout.agent import Engine, Limits
from ..types import Params
from . import distill, evaluate, experts, fitting_mesh, folders, mixtures, scoring, sft, teacher
from .scoring import Teacher
from .setting import MeshConfig, Setting, make_mesh


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    path: str | None = None  # a SentencePiece model or tokenizer.json; None: train a SentencePiece model on the domains' own runs
    vocab_size: int = 640  # of the trained one; model.vocab_size must be the same
    counters: int = 24  # numbers that get one id each in the trained one; larger ones are spelled in digits


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run of the three stages on embedded domains."""

    name: str  # default run directory: runs/<name>
    main: Binding  # what a run does with this config: a function of (cfg, workdir)
    model: ModelConfig  # of student and teachers
    domains: tuple[str, ...]  # in table order
    runs: dict[str, experts.Runs | tuple[experts.Runs, ...]]  # the finite expert data of stage 1, per domain; of several families in a row
    sft: sft.SftConfig  # stage 1
    teachers: dict[str, teacher.TeacherConfig]  # stage 2, per domain
    distill: distill.DistillConfig  # stage 3
    evaluation: evaluate.Evaluation  # held-out tasks of the table
    admission: evaluate.Evaluation  # held-out tasks that decide whether a teacher may teach
    control: sft.SftConfig | None = None  # SFT continued at stage 3's compute; None: stage 1's settings, steps from the compute
    limits: Limits = Limits(temperature=0.0)  # budgets of the evaluations
    tokenizer: TokenizerConfig = TokenizerConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0  # of parameters, data order and rollouts
    checkpoints: dict[str, scoring.Checkpoint] = dataclasses.field(
        default_factory=dict
    )  # domain -> a teacher that exists; stage 2 skips it
    families: dict[str, Domain] = dataclasses.field(
        default_factory=dict
    )  # domain -> what its tasks are drawn from, if not domains.DOMAINS'
    elsewhere: bool = True  # teachers are also judged on the domains that are not theirs; False saves most of the judging with many domains
    initial: str = ""  # a parameters folder (of `a1jax import`, of a stage) that the base model is; empty: random parameters

    def __post_init__(self):
        for name in self.domains:
            if name not in DOMAINS and name not in self.families:
                raise ConfigError(f"domains has '{name}'; there are {', '.join(sorted(DOMAINS))}")
            found = self.family(name).name
            if found != name:
                raise ConfigError(f"families.{name} is of domain '{found}'; a domain's tasks bear its name")
            for field in ("runs", "teachers"):
                if name not in getattr(self, field) and not (field == "teachers" and name in self.checkpoints):
                    raise ConfigError(f"{field} has nothing for domain '{name}'; it has {', '.join(sorted(getattr(self, field)))}")
            if name in self.teachers:
                teacher.check(self.teachers[name], self.family(name))
        for name in self.checkpoints:
            if name not in self.domains:
                raise ConfigError(f"checkpoints has '{name}', which is not among domains; those are {', '.join(self.domains)}")
        for field in ("of", "rows_of"):
            for name in getattr(self.distill, field):
                if name not in DOMAINS and name not in self.families:
                    raise ConfigError(f"distill.{field} has '{name}'; there are {', '.join(sorted({*DOMAINS, *self.families}))}")
        together = sum(distill.rows_in(self.distill, d) for d in self.domains)
        if together % self.distill.microbatches:
            raise ConfigError(
                f"distill.microbatches is {self.distill.microbatches}; the rows of all domains, {together}, must be a multiple of it"
            )
        if self.tokenizer.path is None and self.tokenizer.vocab_size != self.model.vocab_size:
            raise ConfigError(
                f"tokenizer.vocab_size is {self.tokenizer.vocab_size} but model.vocab_size {self.model.vocab_size}; make them equal"
            )

    def family(self, domain: str) -> Domain:
        """What a domain's tasks are drawn from where nothing else is said."""
        return self.families.get(domain, DOMAINS.get(domain))

    def every_family(self) -> list[Domain]:
        """All that a run draws tasks from: each domain's, then those that its data name."""
        runs = [
            *(r for runs in self.runs.values() for r in experts.several(runs)),
            *(x for t in self.teachers.values() for x in t.families()),
            *(r for e in (self.evaluation, self.admission) for o in e.of.values() for r in o),
        ]
        named = [r.family for r in runs if r.family] + [p.family for o in self.distill.of.values() for p in o if p.family]
        out: list[Domain] = []
        for family in (*map(self.family, self.domains), *named):
            out += [family] if family not in out else []
        return out


def run(cfg: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """All three stages, their controls and their judgement; returns the results (see ``collect``). Resumable at every step and border."""
    workdir, began = pathlib.Path(workdir), time.perf_counter()
    with metrics.Writer(workdir) as writer:
        setting = open_setting(cfg, workdir, writer)
        given = open_checkpoints(cfg, setting)
        models, chosen = train_all(cfg, setting, given)
        scores = judge_all(cfg, setting, models, given)
    return collect(cfg, setting, scores, chosen, time.perf_counter() - began)


def open_checkpoints(cfg: Experiment, setting: Setting) -> dict[str, Teacher]:
    """Name as in the table -> teacher, for the domains that need no stage 2. Raises ConfigError where one cannot teach this student."""
    student = (setting.model, setting.tokenizer)
    return {teacher.stage_name(d): scoring.open_checkpoint(source, student, setting.mesh) for d, source in cfg.checkpoints.items()}


def open_setting(cfg: Experiment, workdir: pathlib.Path, writer: metrics.Writer) -> Setting:
    mesh = make_mesh(cfg.mesh, fitting_mesh.demands(cfg))  # these two first, as they can refuse: nothing has been written then
    if cfg.initial:
        folders.check_initial(pathlib.Path(cfg.initial), cfg.model)
    tokenizer = open_tokenizer(cfg, workdir)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids but model.vocab_size is {cfg.model.vocab_size}; set it to at least that"
        )
    return Setting(cfg.model, tokenizer, cfg.domains, mesh, workdir, writer, cfg.seed, cfg.initial, {d: cfg.family(d) for d in cfg.domains})


def open_tokenizer(cfg: Experiment, workdir: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer at ``cfg.tokenizer.path``, or one trained on expert runs and kept in the run directory."""
    if cfg.tokenizer.path is not None:
        return tokenizers.load(cfg.tokenizer.path)
    path = workdir / "tokenizer.model"

    def train() -> None:
        if not path.exists():
            texts, symbols = (
                experts.tokenizer_texts(cfg.every_family(), cfg.seed),
                experts.symbols(cfg.every_family(), cfg.tokenizer.counters),
            )
            tokenizers.train_sentencepiece(texts, path, vocab_size=cfg.tokenizer.vocab_size, symbols=symbols)

    distributed.by_first(train)
    return tokenizers.load(path)


def train_all(cfg: Experiment, setting: Setting, given: dict[str, Teacher]) -> tuple[dict[str, Params], dict[str, str]]:
    """Every model of the table that was trained here by name, and which parameters taught each domain."""
    data = stage_data(cfg, setting)
    with setting.on_mesh():
        models = {"base": setting.init_params()}
    models["sft"] = train_sft(cfg, setting, models["base"], data)
    models |= train_teachers(cfg, setting, models["sft"], data, given)
    chosen = admit(cfg, setting, models, given)
    models["student"] = distill.run(cfg.distill, models["sft"], teachers_of(cfg, setting, models, given, chosen), setting)
    models["sft_continued"] = train_control(cfg, setting, models["sft"], data)
    return models, chosen


def stage_data(cfg: Experiment, setting: Setting) -> dict[str, list]:
    """Domain -> (steps, example) of its finite expert runs."""
    show = cfg.limits.show_tools
    return {d: experts.examples(cfg.family(d), i, cfg.runs[d], "sft", cfg.seed, setting.tokenizer, show) for i, d in enumerate(cfg.domains)}


def train_sft(cfg: Experiment, setting: Setting, base: Params, data: dict[str, list]) -> Params:
    return sft.run(cfg.sft, base, sft.Curriculum(cfg.sft, _mixed(cfg, data), setting), setting)


def train_teachers(
    cfg: Experiment, setting: Setting, params: Params, data: dict[str, list], given: dict[str, Teacher]
) -> dict[str, Params]:
    """Name in the table -> parameters, of every domain whose teacher is not given; params: the model after stage 1."""
    todo = {d: teacher.stage_name(d) for d in cfg.domains if teacher.stage_name(d) not in given}
    return {name: teacher.run(cfg.teachers[d], params, data[d], setting, d, cfg.limits.show_tools) for d, name in todo.items()}


def teachers_of(
    cfg: Experiment, setting: Setting, models: dict[str, Params], given: dict[str, Teacher], chosen: dict[str, str]
) -> dict[str, Teacher]:
    """Domain -> who teaches it; chosen: of ``admit``."""
    own = {name: Teacher(params, setting.model, setting.tokenizer) for name, params in models.items()}
    return {d: (own | given)[chosen[d]] for d in cfg.domains}


def train_control(cfg: Experiment, setting: Setting, params: Params, data: dict[str, list]) -> Params:
    """Stage 1 continued at stage 3's compute."""
    control = control_config(cfg)
    return sft.run(control, params, sft.Curriculum(control, _mixed(cfg, data), setting), setting, stage="sft_continued")


def _mixed(cfg: Experiment, data: dict[str, list]) -> list:
    return [pair for d in cfg.domains for pair in data[d]]


def admit(cfg: Experiment, setting: Setting, models: dict[str, Params], given: dict[str, Teacher]) -> dict[str, str]:
    """Domain -> name of the model that teaches it: its teacher where admitted, else the stage-1 model, which holds the domain."""

    def success(name: str, domains: list[str]) -> dict:
        path = setting.workdir / f"admission/{name}.json"
        return evaluate.run(
            cfg.admission,
            *actor(cfg, setting, models, given, name),
            {d: cfg.family(d) for d in domains},
            f"{name} (admission)",
            path,
            "admission",
        )

    with setting.on_mesh():
        before = success("sft", list(cfg.domains))
        names = {d: teacher.stage_name(d) for d in cfg.domains}
        return {d: name if teacher.admitted(success(name, [d]), before, d) else "sft" for d, name in names.items()}


def actor(cfg: Experiment, setting: Setting, models: dict[str, Params], given: dict[str, Teacher], name: str) -> tuple[Params, Engine]:
    """The parameters of that name and what lets them act. A teacher of another tokenizer acts in its own tokens."""
    if name not in given:
        return models[name], Engine(setting.model, setting.tokenizer, cfg.limits)
    found = given[name]
    length = max(cfg.limits.max_length, cfg.distill.teacher_max_length)
    turn = -(-cfg.limits.max_turn_tokens * length // cfg.limits.max_length)  # its turns grow as its runs do
    return found.params, Engine(found.model, found.tokenizer, dataclasses.replace(cfg.limits, max_length=length, max_turn_tokens=turn))


def distill_flops_in_sft_steps(cfg: Experiment) -> float:
    """How many stage-1 steps cost what stage 3 costs, in model FLOPs.

    Per token: 6 N to train, 2 N to score by each teacher that has a weight, 2 N to sample (N active parameters); rollouts are counted at
    their budget's packed rows.
    """
    tokens = sum(distill.rows_in(cfg.distill, d) for d in cfg.domains) * cfg.distill.max_length
    scorers = sum(share > 0 for share in mixtures.weights(cfg.distill.own_weight, 0, len(cfg.domains)))
    return cfg.distill.steps * tokens * (6 + 2 * scorers + 2) / (6 * cfg.sft.rows * cfg.sft.max_length)


def control_config(cfg: Experiment) -> sft.SftConfig:
    """SFT continued on the same finite data: as given, or stage 1's settings for as many steps as stage 3's compute buys, all lengths."""
    if cfg.control is not None:
        return cfg.control
    return dataclasses.replace(cfg.sft, steps=max(1, round(distill_flops_in_sft_steps(cfg))), phases=())


def judge_all(cfg: Experiment, setting: Setting, models: dict[str, Params], given: dict[str, Teacher]) -> dict[str, dict]:
    """Model name -> domain -> score on the held-out tasks, the same for every model."""

    def score(name: str) -> dict:
        path = setting.workdir / f"evaluations/{name}.json"
        own = {d: family for d, family in setting.families.items() if cfg.elsewhere or name == teacher.stage_name(d)}
        return evaluate.run(cfg.evaluation, *actor(cfg, setting, models, given, name), own or setting.families, name, path)

    with setting.on_mesh():
        return {name: score(name) for name in (*models, *given)}


def collect(cfg: Experiment, setting: Setting, scores: dict[str, dict], chosen: dict[str, str], seconds: float) -> dict[str, Any]:
    """results.json: success per domain and model, the details behind it, and what the run consisted of."""
    columns = {"base": "base", "sft": "sft", "sft_continued": "sft_continued", "student": "student"}
    domains = {}
    for d in cfg.domains:
        row = {column: scores[name][d]["success"] for column, name in columns.items()}
        domains[d] = {**row, "teacher": scores[teacher.stage_name(d)][d]["success"], "n": scores["student"][d]["n"], "taught_by": chosen[d]}
    total, active = transformer.parameter_counts(cfg.model)
    stages = ["sft", *(teacher.stage_name(d) for d in cfg.domains if d not in cfg.checkpoints), "distill", "sft_continued"]
    return {
        "domains": domains,
        "wall_seconds": seconds,
        "scores": scores,
        "stages": {s: setting.facts(s) for s in stages},
        "parameters": {"total": total, "active": active},
        "seed": cfg.seed,
    }
