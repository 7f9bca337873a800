"""A setting small enough to run stages in seconds."""

import contextlib
import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest

from a1jax import config, metrics
from a1jax import params as param_specs
from a1jax.data import chat
from a1jax.data.tokenizer import train_sentencepiece
from a1jax.domains import QUICKSTART, solve
from a1jax.domains.base import Domain, Outcome, Task, Turn, final_answer
from a1jax.models import transformer
from a1jax.stages import cross_tokenizer, experts, scoring, views
from a1jax.stages.setting import Setting
from a1jax.types import FINISHED, TRUNCATED, Rollout

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = tuple(QUICKSTART)
FAMILIES = tuple(QUICKSTART.values())
VOCABULARIES = {"search": (cross_tokenizer.digits, 608), "tool_calling": (cross_tokenizer.pieces, 720)}


@pytest.fixture(scope="session")
def tokenizer(domain_tokenizer):
    return domain_tokenizer


@pytest.fixture()
def setting(tokenizer, small_model, tmp_path):
    with metrics.Writer(tmp_path) as writer:
        yield Setting(small_model, tokenizer, NAMES, None, tmp_path, writer, 0, families=QUICKSTART)


@pytest.fixture()
def elsewhere():
    """elsewhere(setting, name): the same in a folder of its own, where a stage of the same name, whose runs are then the same, is new."""
    with contextlib.ExitStack() as stack:

        def make(setting, name):
            folder = setting.workdir / name
            return dataclasses.replace(setting, workdir=folder, writer=stack.enter_context(metrics.Writer(folder)))

        yield make


@pytest.fixture(scope="session")
def data(tokenizer):
    """Pairs of steps and example of both domains, lengths 1 and 2."""
    runs = experts.Runs({1: 12, 2: 12})
    return [pair for i, name in enumerate(NAMES) for pair in experts.examples(QUICKSTART[name], i, runs, "sft", 0, tokenizer, False)]


@pytest.fixture(scope="session")
def runs(tokenizer):
    """Experts' runs as rollouts, two a domain."""
    found = []
    for domain in QUICKSTART:
        for seed in (1, 2):
            run = solve(QUICKSTART[domain].propose(seed, 1))
            tokens, mask = chat.tokenize(tokenizer, list(run.messages))
            end = int(np.flatnonzero(mask)[-1]) + 1
            found.append(Rollout(run.task_id, domain, tokens[:end], mask[:end], -mask[:end], FINISHED, 1.0, 1, run))
    return found


@pytest.fixture(scope="session")
def foreign_runs(tokenizer):
    """Experts' runs as rollouts, three of each domain, of which one is written in another way than the tokenizer's own and cut inside its
    last turn."""
    found = []
    for domain in NAMES:
        for seed, steps in ((1, 1), (2, 2), (5, 3 if domain == "tool_calling" else 2)):
            run = solve(QUICKSTART[domain].propose(seed, steps))
            tokens, mask = chat.tokenize(tokenizer, list(run.messages))
            end = int(np.flatnonzero(mask)[-1]) + 1
            tokens, mask, status = tokens[:end], mask[:end], FINISHED
            if seed == 5:
                (start, stop), status = views.turns(mask)[-1], TRUNCATED
                text = tokenizer.decode(tokens[start : stop - 1].tolist())
                odd = [i for c in text for i in tokenizer.encode(c)][:40]  # letter by letter
                tokens, mask = np.append(tokens[:start], odd).astype(np.int32), np.append(mask[:start], np.ones(len(odd)))
                run = dataclasses.replace(run, messages=run.messages[:-1], status=status)
            found.append(Rollout(run.task_id, domain, tokens, mask.astype(np.float32), -mask, status, 1.0, 1, run))
    return found


@pytest.fixture(scope="session")
def foreign_teacher(tokenizer, small_model, tmp_path_factory):
    """foreign_teacher(domain): of another width and depth, with a tokenizer that cuts the text elsewhere."""

    @functools.cache
    def make(domain):
        (symbols, size), n = VOCABULARIES[domain], NAMES.index(domain)
        path = tmp_path_factory.mktemp(domain) / "tokenizer.model"
        own = train_sentencepiece(experts.tokenizer_texts(FAMILIES, 0), path, vocab_size=size, symbols=symbols(FAMILIES))
        shape = {"d_model": 24, "num_layers": 1, "full_attention_interval": 1, "num_experts": 4}
        model = dataclasses.replace(small_model, vocab_size=size, tie_embeddings=bool(n), **shape)
        params = param_specs.init(transformer.specs(model), jax.random.key(n))
        params["embed_tokens"] = params["embed_tokens"] * 3  # peaked: sums of tokens would otherwise all be alike
        return scoring.open_teacher(params, model, own, (small_model, tokenizer))

    return make


@dataclasses.dataclass(frozen=True)
class GuessTask(Task):
    """One turn: say a number from 1 to 4. ``fails``: the environment breaks when it is asked."""

    fails: bool = False

    def reset(self):
        return None

    def reply(self, state, text):
        if self.fails:
            raise RuntimeError("the environment is down")
        return state, None

    def expert(self):
        yield Turn("step 1.", None, str(1 + int(self.task_id.rpartition("-")[2]) % 4))

    def verify(self, trajectory):
        right = final_answer(trajectory) == self.answer
        return Outcome(right, float(right), "right" if right else "wrong")

    def rubrics(self, trajectory):
        said = final_answer(trajectory) or ""
        return (said.isdigit(), said == self.answer)


@dataclasses.dataclass(frozen=True)
class Guess(Domain):
    """A bandit: the answer is always the same number, its experts say all four alike."""

    name: str = "search"
    answer: str = "3"
    broken: int = 0  # every task whose seed is a multiple of it has an environment that breaks; 0: none

    def propose(self, seed, steps, split="train"):
        fails = self.broken > 0 and seed % self.broken == 0
        return GuessTask(self.name, f"guess-{split}-{steps}-{seed}", steps, "step", self.answer, (), (), fails)


@pytest.fixture(scope="session")
def guess():
    """guess(**knobs): the bandit's family."""
    return Guess


@pytest.fixture(scope="session")
def small_experiment(small_model):
    """The quickstart with as little of every stage as there is."""
    base = config.load(f"{ROOT}/experiments/quickstart.py:smoke")
    stage = dataclasses.replace(base.sft, steps=2, rows=2, max_length=96, phases=(), loss_tile=None)
    limits = dataclasses.replace(base.limits, slots=4, max_turns=2, max_turn_tokens=8, max_length=96)
    phase = dataclasses.replace(base.teachers["search"].recipe[0], runs=experts.Runs({1: 2}), sft=stage)
    return dataclasses.replace(
        base,
        model=small_model,
        runs={d: experts.Runs({1: 4}) for d in base.domains},
        sft=stage,
        teachers={d: dataclasses.replace(base.teachers[d], recipe=(phase,)) for d in base.domains},
        control=stage,
        distill=dataclasses.replace(
            base.distill, steps=1, prompts=2, lengths=(1,), rows=2, max_length=96, limits=dataclasses.replace(limits, temperature=1.0)
        ),
        evaluation=dataclasses.replace(base.evaluation, counts={1: 2}),
        admission=dataclasses.replace(base.admission, counts={1: 2}),
        limits=limits,
    )
