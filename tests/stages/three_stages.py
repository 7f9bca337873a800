"""An experiment as small as three stages can be, for tests that run it in several processes.

a1jax run tests/stages/three_stages.py --coordinator HOST:PORT --processes 2 --process I
"""

from a1jax.config import ConfigError, bind
from a1jax.domains import QUICKSTART
from a1jax.models import config as models
from a1jax.rollout.agent import Limits
from a1jax.stages import pipeline
from a1jax.stages.distill import DistillConfig
from a1jax.stages.evaluate import Evaluation
from a1jax.stages.experts import Runs
from a1jax.stages.grpo import GrpoConfig
from a1jax.stages.pipeline import Experiment, TokenizerConfig
from a1jax.stages.setting import MeshConfig
from a1jax.stages.sft import SftConfig
from a1jax.stages.teacher import SftPhase, TeacherConfig
from tests.stages.descent import descent

DOMAINS = ("search",)


def get_config(arg: str = "") -> Experiment:
    """ "": stages of one or two steps. long: both kinds of layers, a teacher by reinforcement, two domains."""
    if arg not in ("", "long"):
        raise ConfigError(f"three_stages has no argument '{arg}'; there are '' and 'long'")
    domains = tuple(QUICKSTART) if arg else DOMAINS
    width = {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "expert_width": 8, "shared_expert_width": 8}
    layers = {} if arg else {"num_layers": 1, "full_attention_interval": 2}
    plain, runs = bind(descent, rate=0.03), {d: Runs({1: 24}) for d in domains}
    sft = SftConfig(steps=2, rows=4, max_length=64, optimizer=plain, save_every=2, log_every=1, vocab_block=640)
    limits = Limits(slots=4, max_turns=1, max_turn_tokens=4, max_length=64)  # all of one temperature: one program for all rollouts
    distill = DistillConfig(steps=2, prompts=2, lengths=(1,), rows=4, max_length=64, k=4, optimizer=plain, vocab_block=640, limits=limits)
    grpo = GrpoConfig(
        steps=1, prompts=2, samples=2, rows=4, max_length=64, optimizer=plain, vocab_block=640, limits=limits, drop_equal=False
    )
    recipe = (SftPhase(Runs({1: 24}), sft), *([grpo] if arg else []))
    return Experiment(
        name="three_stages",
        main=bind(pipeline.run),
        model=models.tiny(vocab_size=640, d_model=16, num_experts=8, **layers, **width),
        tokenizer=TokenizerConfig(vocab_size=640),
        domains=domains,
        families={d: QUICKSTART[d] for d in domains},
        runs=runs,
        sft=sft,
        teachers={d: TeacherConfig(recipe) for d in domains},
        distill=distill,
        control=sft,
        evaluation=Evaluation(counts={1: 2}),
        admission=Evaluation(counts={1: 2}),
        limits=limits,
        mesh=MeshConfig({"fsdp": 4, "context": 2}),
    )
