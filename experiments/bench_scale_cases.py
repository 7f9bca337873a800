"""The cases of experiments.bench_scale, one per process: compiles, says so, waits for a line on stdin, prints its findings, all as JSON.

    python -m experiments.bench_scale_cases '{"name": "peak", "case": "peak", "smoke": true}' < /dev/null

A case is case(options) -> (compile seconds by name, run); run() gives pieces of the result as they are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

SHARES = (0.28, 0.21, 0.16, 0.12, 0.09, 0.07, 0.05, 0.02)  # lengths of a row's runs
TOLERANCE = 0.02  # relative error of bfloat16 kernels against float32
K = 16  # ids a teacher gives per token
Case = tuple[dict[str, float], Callable[[], Iterator[dict]]]


def seconds(run: Callable[[], Any]) -> float:
    import jax

    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def compiled(function: Callable, *shapes: Any, **options: Any) -> tuple[Callable, float]:
    import jax

    began = time.perf_counter()
    made = jax.jit(function, **options).lower(*shapes).compile()
    return made, time.perf_counter() - began


def error(got: Any, expected: Any) -> float:
    """|got - expected| / |expected|; a nan stays one."""
    import jax.numpy as jnp

    got, expected = (x.astype(jnp.float32) for x in (got, expected))
    return float(jnp.linalg.norm((got - expected).reshape(-1)) / jnp.linalg.norm(expected.reshape(-1)))


def model(o: dict) -> Any:
    from a1jax.models.config import one_billion

    sizes = {"attention": o["attention"], "moe": o["moe"], "remat": "layer", "expert_block": o["block"], "flash_runs": 16}
    if o["smoke"]:
        sizes |= {"vocab_size": 512, "d_model": 128, "num_layers": 4, "num_heads": 2, "head_dim": 32, "linear_num_key_heads": 2,
                  "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "num_experts": 8,
                  "expert_width": 128, "num_experts_active": 2, "num_kv_heads": 1}  # fmt: skip
    return one_billion(**sizes)


def run_lengths(tokens: int, whole: bool) -> list[int]:
    if whole:
        return [tokens]
    lengths = [int(share * tokens) for share in SHARES]
    return [tokens - sum(lengths[1:]), *lengths[1:]]


def batch(tokens: int, vocabulary: int, whole: bool = False) -> Any:
    """One packed row; the loss looks at three of four targets, never at one across a border."""
    import numpy as np

    from a1jax.types import Batch

    rng, lengths = np.random.default_rng(0), run_lengths(tokens, whole)
    ids = rng.integers(0, vocabulary, (1, tokens + 1)).astype(np.int32)
    segments = np.repeat(np.arange(len(lengths)) + 1, lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    last = np.roll(segments, -1, axis=1) != segments
    last[:, -1] = True
    mask = np.where(last | (rng.random((1, tokens)) < 0.25), 0.0, 1.0).astype(np.float32)
    return Batch(ids[:, :-1], ids[:, 1:], mask, positions, segments, np.zeros_like(segments))


def flops_per_token(cfg: Any, lengths: list[int], stage: str) -> float:
    """Model FLOPs of one step per token, by the formula above."""
    from a1jax.models import transformer

    table = cfg.vocab_size * cfg.d_model
    full = sum(cfg.is_full_attention(i) for i in range(cfg.num_layers))
    mean = sum(n * n for n in lengths) / sum(lengths)  # a token's own run, on average
    body = 2 * (transformer.parameter_counts(cfg)[1] - table)  # the table is tied: it is counted once
    body += full * 2 * cfg.num_heads * cfg.head_dim * mean
    body += (cfg.num_layers - full) * 6 * cfg.linear_num_value_heads * cfg.linear_key_head_dim * cfg.linear_value_head_dim
    return 3 * (body + 2 * table) if stage == "sft" else (body + 2 * table) + 3 * body + 2 * table


def stage_case(o: dict) -> Case:
    """A whole train step of a stage at o["tokens"] tokens."""
    import jax

    from a1jax import optim, train
    from a1jax import params as param_specs
    from a1jax.models import transformer
    from a1jax.stages import distill, scoring, sft
    from a1jax.types import TrainState

    tokens, cfg, block = o["tokens"], model(o), 4096
    specs = transformer.specs(cfg)
    tx = optim.adamw(specs, 1000, learning_rate=1e-5)
    row = batch(tokens, cfg.vocab_size)

    def fresh(key: jax.Array) -> TrainState:
        params = param_specs.init(specs, key)
        return TrainState(jax.numpy.zeros((), jax.numpy.int32), params, tx.init(params), key)

    key = jax.random.key(0)
    took, sft_loss = {}, functools.partial(sft.loss, model=cfg, vocab_block=block, tile=None)
    init, took["init"] = compiled(fresh, key)
    state = jax.eval_shape(fresh, key)
    data, score = row, None
    if o["stage"] == "sft":
        weigh = functools.partial(sft.weigh, num_domains=1, reduction="token_mean")
        step = train.make_train_step(sft_loss, tx, 1, weigh, sft.finish)
    else:
        frozen = dataclasses.replace(cfg, param_dtype="bfloat16", remat="none")
        teacher, took["teacher init"] = compiled(functools.partial(param_specs.init, transformer.specs(frozen)), key)
        native = functools.partial(scoring.native, model=frozen, k=K, block=block)
        shapes = param_specs.abstract(transformer.specs(frozen))
        score, took["teacher"] = compiled(native, shapes, row)
        data = {"batch": row, **jax.eval_shape(native, shapes, row)}
        how = distill.DistillConfig(k=K, vocab_block=block, max_length=max(tokens, 512))
        weigh = functools.partial(distill.weigh, num_domains=1, reduction=how.reduction)
        step = train.make_train_step(functools.partial(distill.loss, model=cfg, cfg=how), tx, 1, weigh, distill.finish)
    step, took["step"] = compiled(step, state, data, donate_argnums=0)

    def run() -> Iterator[dict]:
        reserve(tokens)
        state, frozen_params = init(key), teacher(jax.random.key(1)) if score else None
        teachers = sum(x.nbytes for x in jax.tree.leaves(frozen_params)) if score else 0
        yield {"planned_bytes": planned(step) + teachers}
        for name, whole in (("packed", False), ("whole", True)) if o["stage"] == "sft" else (("packed", False),):
            row = jax.device_put(batch(tokens, cfg.vocab_size, whole))
            times, began = [], time.perf_counter()
            while len(times) < 2 or (len(times) < 7 - 2 * whole and time.perf_counter() - began < o["seconds"] / (1 + whole)):
                start = time.perf_counter()
                state, metrics = step(state, {"batch": row, **score(frozen_params, row)} if score else row)
                loss = float(metrics["loss"])
                times.append(time.perf_counter() - start)
            each = statistics.median(times[1 if len(times) < 5 else 2 :])
            flops = flops_per_token(cfg, run_lengths(tokens, whole), o["stage"])
            found = {"seconds": each, "steps": len(times), "first": times[0], "tokens_per_second": tokens / each, "loss": loss}
            found |= {"grad_norm": float(metrics["grad_norm"]), "flops_per_token": flops, "flops_per_second": flops * tokens / each}
            yield {name: found, **({} if whole else memory())}

    return took, run


def planned(step: Any) -> int:
    """Bytes that the compiler plans for a program's arguments, results and temporaries at once."""
    m = step.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def memory() -> dict:
    import jax

    found = jax.devices()[0].memory_stats() or {}
    return {name: found[name] for name in ("peak_bytes_in_use", "bytes_limit") if name in found}


def reserve(tokens: int) -> None:
    """Long rows: takes most of the device in one piece and gives it back to the allocator, whose own growth by doubling would leave no
    room for one large buffer. Shows in peak_bytes_in_use, so read planned_bytes for these."""
    import jax
    import jax.numpy as jnp

    limit = memory().get("bytes_limit", 0)
    for share in (0.95, 0.9, 0.85, 0.8) if limit and tokens > 65_536 else ():
        try:
            jax.block_until_ready(jnp.zeros(int(share * limit), jnp.uint8))
        except jax.errors.JaxRuntimeError as refused:
            print(f"no {share:.0%} of the memory in one piece: {str(refused)[:200]}", file=sys.stderr)
        else:
            return


def peak_case(o: dict) -> Case:
    """What the card reaches in one large bfloat16 matmul."""
    import jax
    import jax.numpy as jnp

    n = 256 if o["smoke"] else 8192
    shape = jax.ShapeDtypeStruct((n, n), jnp.bfloat16)
    product, took = compiled(lambda a, b: a @ b, shape, shape)

    def run() -> Iterator[dict]:
        a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
        jax.block_until_ready(product(a, b))
        each = statistics.median(seconds(lambda: [product(a, b) for _ in range(10)]) / 10 for _ in range(5))
        device = jax.devices()[0]
        yield {"matmul_flops_per_second": 2 * n**3 / each, "device": device.device_kind, "jax": jax.__version__, **memory()}

    return {"matmul": took}, run


def kernel_case(o: dict) -> Case:
    """A flash kernel or a form of the experts: errors of value and gradients against float32, and the time of both at 8,192 tokens."""
    import jax
    import jax.numpy as jnp

    cfg = model({**o, "attention": "auto", "moe": "ragged"})
    of = attention_forms if o["case"] == "attention" else expert_forms
    short, long = (128, 256) if o["smoke"] else (1024, 8192)
    arrays, ours, exact = of(cfg, o)

    def both(function: Callable, *args: Any) -> Any:
        *inputs, cotangent = args
        value, pull = jax.vjp(lambda *x: function(*x, *inputs[differentiable:]), *inputs[:differentiable])
        return value, pull(cotangent.astype(value.dtype))

    differentiable = 3
    small, large, whole = arrays(short, False), arrays(long, False), arrays(long, True)
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in small]
    check, took = compiled(functools.partial(both, ours), *small)
    fast, more = compiled(functools.partial(both, ours), *large)

    def run() -> Iterator[dict]:
        with jax.default_matmul_precision("highest"):
            value, gradients = jax.jit(functools.partial(both, exact))(*wide)
        got, pulled = check(*small)
        errors = [error(got, value), *(error(a, b) for a, b in zip(pulled, gradients, strict=True))]
        out: dict[str, Any] = {"errors": errors, "correct": all(e < TOLERANCE for e in errors)}  # a nan is not below
        for name, args in (("packed", large), ("whole", whole)):
            fast(*args)
            out[f"{name}_seconds"] = statistics.median(seconds(lambda a=args: [fast(*a) for _ in range(3)]) / 3 for _ in range(5))
        yield out

    return {"small": took, "long": more}, run


def attention_forms(cfg: Any, o: dict) -> tuple[Callable, Callable, Callable]:
    """(arrays(tokens, whole) -> q, k, v, runs, cotangent; the kernel; the definition)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from a1jax.models import attention
    from a1jax.models.attention_gpu import flash_attention

    def arrays(tokens: int, whole: bool) -> list:
        keys, widths = jax.random.split(jax.random.key(tokens), 4), (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
        shapes = [(1, tokens, heads, cfg.head_dim) for heads in widths] + [(1, tokens, cfg.num_heads * cfg.head_dim)]
        *qkv, g = (jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True))
        lengths = run_lengths(tokens, whole)
        return [*qkv, jnp.asarray(np.repeat(np.arange(len(lengths)), lengths)[None], jnp.int32), g]

    def exact(q: jax.Array, k: jax.Array, v: jax.Array, runs: jax.Array) -> jax.Array:
        return attention.causal_attention(q, k, v, runs, 0)

    if o["form"] == "chunked":
        return arrays, lambda q, k, v, runs: attention.causal_attention(q, k, v, runs, cfg.attention_chunk), exact
    kernel = "cudnn" if o["form"] == "flash" else "triton"
    return arrays, functools.partial(flash_attention, kernel=kernel, most_runs=16, interpret=o["smoke"]), exact


def expert_forms(cfg: Any, o: dict) -> tuple[Callable, Callable, Callable]:
    """(arrays(tokens, whole) -> tokens, matrices in, matrices out, router weights, cotangent; the form; the definition)."""
    import jax
    import jax.numpy as jnp

    from a1jax.models import experts, moe
    from a1jax.models.experts_gpu import grouped_dot

    e, d, f = cfg.num_experts, cfg.d_model, cfg.expert_width

    def arrays(tokens: int, whole: bool) -> list:
        del whole
        keys = jax.random.split(jax.random.key(tokens), 5)
        shapes = ((tokens, d), (e, d, 2 * f), (e, f, d), (tokens, d))
        scales = (1.0, d**-0.5, f**-0.5, 1.0)
        x, up, down, g = (s * jax.random.normal(k, n, jnp.bfloat16) for k, n, s in zip(keys[:4], shapes, scales, strict=True))
        return [x, up, down, moe.route(jax.random.normal(keys[4], (tokens, e)), cfg.num_experts_active), g]

    def form(x: jax.Array, up: jax.Array, down: jax.Array, weights: jax.Array) -> jax.Array:
        if o["form"] == "blocked":
            return experts.experts_blocked(x, weights, up, down, cfg.num_experts_active, cfg.expert_block)
        dot = functools.partial(_by_sizes, grouped_dot, not o["smoke"]) if o["form"] == "grouped" else jax.lax.ragged_dot
        return experts.experts_ragged(x, weights, up, down, cfg.num_experts_active, dot)

    return arrays, form, lambda x, up, down, weights: experts.experts_dense(x, weights, up, down)


def _by_sizes(dot: Callable, kernels: bool, x: Any, w: Any, sizes: Any) -> Any:
    return dot(x, w, sizes, kernels)


def align_case(o: dict) -> Case:
    """kernels/vocab_align: the best units of a teacher of 151,936 ids by the Triton kernel, by blocked XLA and by the definition."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from a1jax.kernels import vocab_align

    vocabulary, tokens, width, k, tile = (2048, 64, 64, 16, 32) if o["smoke"] else (151_936, 8192, 1024, 128, 512)
    rng = np.random.default_rng(0)
    units = np.sort(rng.integers(0, int(0.8 * vocabulary), vocabulary)).astype(np.int32)  # mostly one id a unit, some two to five
    made = vocab_align.layout.build(units)
    hidden = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((vocabulary, width), jnp.bfloat16)
    arrange, took = compiled(lambda m: vocab_align.layout.arrange(m, made), table)
    arranged = jax.eval_shape(lambda m: vocab_align.layout.arrange(m, made), table)

    def dense(hidden: jax.Array, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        def some(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = jnp.einsum("nd,vd->nv", rows, matrix, preferred_element_type=jnp.float32)
            top = jnp.max(logits, axis=1, keepdims=True)
            mass = jax.ops.segment_sum(jnp.exp(logits - top).T, jnp.asarray(units), int(units.max()) + 1, indices_are_sorted=True)
            values, index = jax.lax.top_k(jnp.log(mass.T), k)
            return values + top, index

        return jax.tree.map(lambda x: x.reshape(tokens, k), jax.lax.map(some, hidden.reshape(-1, tile, width)))

    names = ("xla",) if o["smoke"] else ("triton", "xla")
    forms, seconds_to_compile = {}, {"arrange": took}
    for name in names:
        program = functools.partial(vocab_align.aligned_topk, k=k, implementation=name)
        forms[name], seconds_to_compile[name] = compiled(program, hidden, arranged)
    reference, seconds_to_compile["dense"] = compiled(dense, hidden, table)

    def run() -> Iterator[dict]:
        matrix = jax.random.normal(jax.random.key(0), (vocabulary, width), jnp.bfloat16)
        states = 4 / width**0.5 * jax.random.normal(jax.random.key(1), (tokens, width), jnp.bfloat16)
        made, (values, index) = arrange(matrix), reference(states, matrix)
        yield {"dense_seconds": min(seconds(lambda: reference(states, matrix)) for _ in range(2))}
        for name, form in forms.items():
            found = form(states, made)
            taken = min(seconds(lambda form=form: form(states, made)) for _ in range(3))
            different = float(jnp.max(jnp.abs(found.values - values)))
            same, again = float(jnp.mean(found.units == index)), int(found.recomputed)
            yield {name: {"seconds": taken, "largest_difference": different, "same_units": same, "recomputed": again}}

    return seconds_to_compile, run


CASES = {"peak": peak_case, "attention": kernel_case, "experts": kernel_case, "stage": stage_case, "align": align_case}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("options", type=json.loads, help="JSON: name, case, smoke, attention, moe, block, form, stage, tokens, seconds")
    options = parser.parse_args().options
    took, run = CASES[options["case"]](options)
    print(json.dumps({"compile_seconds": {name: round(s, 2) for name, s in took.items()}}), flush=True)
    sys.stdin.readline()
    for part in run():
        print(json.dumps(part), flush=True)


if __name__ == "__main__":
    main()
