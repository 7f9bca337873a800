"""Rollouts against the raw decode step: what turns, tools, refilled slots and known tokens cost, and what feeding these in pieces saves.

    python -m experiments.bench_rollout              # a table, minutes on 2 cores
    python -m experiments.bench_rollout --rounds 9   # more alternations

Raw: the jitted step alone, every slot active, ids handed from call to call on the device. Engine: whole rollouts by an untrained model
made to behave (the expert's ids are what it writes, so that turns, calls, observations and lengths are those of real runs), in the
domains named, once with known tokens in pieces and once one by one. Both in slot steps (tokens fed) a second, alternating; the ratio is
the median over rounds of the pair's. The target, 70 % of the raw speed with 64 environments, names no queue: it is measured with 1,024
runs, 16 for every slot, and one of 512 misses it; a step of GRPO or distillation that queues fewer has a longer tail for its length, in
which no run waits for the slots that are free. ``--tasks`` is the length of the queue.

Measured on 2 x86_64 cores with nothing beside it, jax 0.10.2, seed 0, 64 slots, --rounds 5, commit 118f576 (with a larger vocabulary, as
in the commit after it). A queue of 1,024 runs, now the default: none in pieces 58,081 slot steps/s against 70,420 raw, ratio 0.81 (target
0.70: met), idle 0.12; pieces of 8: 0.68, of 16: 0.75, of 32: 0.78; sampled tokens/s 32,348, 25,216, 27,817, 26,037. A queue of 512: 0.65
(target missed), 0.62, 0.62, 0.70, idle 0.24 and more: most of it is the tail when no task waits any more. So pieces do not pay for runs of
100 tokens, and Limits.feed_tokens is 0; prompts of thousands are not measured. The few runs that are not accepted are longer than the 384
tokens allowed here. At commit 8f3a268, --rounds 3: 0.79, in pieces 0.69, 0.75, 0.76. On a machine with load 7 those in pieces were lower
(a queue of 512: 0.67, 0.43, 0.47, 0.48).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from a1jax import params as param_specs
from a1jax.data import chat
from a1jax.data.tokenizer import Tokenizer, train_sentencepiece
from a1jax.domains import DOMAINS, Task, solve
from a1jax.models import config as models
from a1jax.models import transformer
from a1jax.models.config import ModelConfig
from a1jax.rollout import sampler
from a1jax.rollout.agent import Engine, Limits
from a1jax.stages import experts
from a1jax.types import FINISHED, Params, Rollout

SCALE = 4096  # more ids than the tokenizer has, and a power of two: division by it is exact
QUEUE = 1024  # runs a round: the setting of the target
NAMES = ("search", "tool_calling", "science", "instruction_following")
LIMITS = Limits(slots=64, max_turns=64, max_turn_tokens=256, max_length=384)


def behaved(cfg: ModelConfig, tokenizer: Tokenizer, limits: Limits, scripts: list[np.ndarray]) -> Engine:
    """An engine whose device does all its work and then puts the expert's id of this run and place for the one it sampled. The numbers a
    run samples with say which: (id + 1/2) / SCALE."""
    engine = Engine(cfg, tokenizer, limits)

    def numbers(seed: int, run: int, attempt: int, length: int) -> np.ndarray:
        return (np.resize(scripts[run], length + 1)[1:].astype(np.float32) + 0.5) / SCALE

    def replaced(program):
        def call(params, slots, *args):
            _, logp, (cache, last), *routes = program(params, slots, *args)
            ids = jnp.floor(args[-1] * SCALE).astype(jnp.int32)
            told = jnp.where(args[-2], ids, last) if len(args) == 4 else last.at[args[0]].set(ids, mode="drop")
            return ids, logp, (cache, told), *routes

        return jax.jit(call, donate_argnums=1)

    engine.numbers, engine.advance, engine.feed = numbers, replaced(engine.advance), replaced(engine.feed)
    return engine


def raw(cfg: ModelConfig, params: Params, limits: Limits, steps: int) -> float:
    """Slot steps a second of the jitted step alone."""
    advance = sampler.make_advance(cfg, limits.temperature)
    params, slots, b = sampler.make_unstack(cfg)(params), sampler.open_slots(cfg, limits.slots, limits.max_length), limits.slots
    tokens, on, uniforms = np.full(b, sampler.LAST, np.int32), np.ones(b, bool), np.full(b, 0.5, np.float32)
    began = time.perf_counter()
    for i in range(steps):
        ids, _, slots = advance(params, slots, tokens, on & (i % limits.max_length == 0), on, uniforms)
    jax.block_until_ready(ids)
    return b * steps / (time.perf_counter() - began)


def setup(count: int) -> tuple[ModelConfig, Tokenizer, list[Task], list[np.ndarray]]:
    families = [DOMAINS[name] for name in NAMES]
    tasks = [families[i % len(NAMES)].propose(i, 1 + i // len(NAMES) % 4) for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        texts, symbols = experts.tokenizer_texts(families, 0), experts.symbols(families, 24)
        tokenizer = train_sentencepiece(texts, f"{folder}/tokenizer.model", 1536, symbols)
    scripts = [chat.tokenize(tokenizer, list(solve(task).messages))[0] for task in tasks]
    return models.tiny(vocab_size=tokenizer.vocab_size), tokenizer, tasks, scripts


def measure(
    cfg: ModelConfig, tokenizer: Tokenizer, params: Params, limits: Limits, tasks: list[Task], scripts: list[np.ndarray], rounds: int
) -> tuple[list[tuple[float, float]], list[float], list[Rollout], dict]:
    """((raw, engine) slot steps a second of every round, sampled tokens a second of every round, the runs and counts of the last)."""
    engine = behaved(cfg, tokenizer, limits, scripts)
    raw(cfg, params, limits, 10), engine.run(params, tasks[: limits.slots * 2], 0)
    pairs, rates = [], []
    for _ in range(rounds):
        alone = raw(cfg, params, limits, 600)
        done, counts = engine.run(params, tasks, 0)
        pairs.append((alone, counts["slot_steps"] / counts["engine_seconds"]))
        rates.append(counts["tokens_per_second"])
    return pairs, rates, done, counts


def ratio_of(pairs: list[tuple[float, float]]) -> float:
    """The engine's share of the raw speed, the median over rounds."""
    return statistics.median(engine / alone for alone, engine in pairs)


def main(rounds: int, count: int, slots: int) -> None:
    cfg, tokenizer, tasks, scripts = setup(count)
    params = param_specs.init(transformer.specs(cfg), jax.random.key(0))
    limits = dataclasses.replace(LIMITS, slots=slots)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, commit {commit}, seed 0")
    print(f"{slots} slots, a queue of {count} runs of {', '.join(NAMES)}; {sum(map(len, scripts)) / count:.0f} tokens a run")
    for pieces in (0, 8, 16, 32):
        cut = dataclasses.replace(limits, feed_tokens=pieces)
        pairs, rates, done, counts = measure(cfg, tokenizer, params, cut, tasks, scripts, rounds)
        right = sum(run.status == FINISHED for run in done)
        alone, whole = (statistics.median(x) for x in zip(*pairs, strict=True))
        print(
            f"pieces of {pieces:2}: raw {alone:8,.0f}/s, engine {whole:8,.0f}/s, ratio {ratio_of(pairs):.2f}; "
            f"sampled {statistics.median(rates):7,.0f}/s; "
            f"idle {counts['idle_share']:.2f}; {counts['decode_steps']} calls, {counts['feed_steps']} of pieces; {right} accepted"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="alternations of raw and engine")
    parser.add_argument("--tasks", type=int, default=QUEUE, help=f"runs queued in one round, {QUEUE} by default: the target's")
    parser.add_argument("--slots", type=int, default=64, help="environments in lockstep")
    main(parser.parse_args().rounds, parser.parse_args().tasks, parser.parse_args().slots)
