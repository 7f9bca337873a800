"""One NVIDIA GPU: tokens/s, share of peak and memory of the 1.0B member of the family at 8K, 32K and 131K tokens, SFT and distillation.

    python -m experiments.bench_scale --out bench_scale.json          # about 4 minutes on one H100
    python -m experiments.bench_scale --tokens 8192 --stage sft       # less of it
    python -m experiments.bench_scale --smoke                         # all of it tiny, on a CPU, in two minutes: no figure counts

The real train steps (stages.sft, stages.distill with stages.scoring.native as the teacher) on one row of random tokens packed of eight
runs; SFT also on one whole run. float32 parameters and AdamW state, bfloat16 compute, remat per layer, blocked losses, state donated.
First, small: the flash kernels and the forms of the experts against float32 references, and which of the correct ones is fastest at
8,192 tokens; the steps use those.
Every case is a process of its own (experiments.bench_scale_cases; its memory peak is its own): all compile side by side, then run one at
a time. A case that fails, is refused by a kernel or runs out of memory or time is a row that says so. Results are written as soon as
they are there.

FLOPs: 2 per parameter that multiplies and token forward and 4 backward (the table multiplies too: it is the unembedding), 2 H F n per
token of a run of n in full attention forward, 6 H DK DV in the delta rule; the distillation's student needs of its table one forward
pass, for the coverage. Recomputation is work but no model FLOPs.

Measured on one NVIDIA H100 80GB HBM3 (driver 580.159, CUDA 13.0, cuDNN 9.19, jax 0.11.2), commit 50b5570, seed 0; the 131,072 rows by a
second call without command buffers (``XLA_FLAGS=--xla_gpu_enable_command_buffer= ... --no-kernels --no-align --tokens 131072``), now the
default at that length. bfloat16 peak measured by 8192^3: 760 and 711 TFLOP/s. Rows packed of eight runs / one whole run:

    stage    tokens   s a step       tokens/s         share of measured peak   GB planned   compiled in
    sft        8,192  0.49 / 0.50    16,733 / 16,458  4.1 % / 4.8 %            20.1         81 s (six at once)
    sft       32,768  1.83 / 1.97    17,929 / 16,622  4.9 % / 7.5 %            30.4         82 s
    sft      131,072  did not run: 75.9 GB planned, and no room left for the driver to load kernels
    distill    8,192  0.58           14,018           4.4 %                    21.9        128 s
    distill   32,768  2.23           14,701           5.1 %                    32.3        127 s
    distill  131,072  14.1            9,281           5.0 %                    77.9        141 s

A low share, and no length changes it: by the kernels' own times below, attention and experts are a small part of a step; most of the rest
is likely the delta rule, in full float32 and chunk after chunk, which was not timed by itself. Kernels, forward and backward at 8,192
tokens, milliseconds and largest error against float32: attention cuDNN 1.2 (whole run 3.0) 0.003, Triton 6.5 0.004, chunked 10.2 0.003;
experts by Mosaic 1.41, blocked 1.95, ragged_dot 20.9, 0.005 each. kernels/vocab_align, k = 128 of 151,936 ids for 8,192 positions of
width 1,024: dense 107 ms, blocked XLA 57, the Triton kernel 60; all but 1 in 87,000 units the same, values within 2e-6.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable

STAGES, LENGTHS = ("sft", "distill"), (8192, 32_768, 131_072)
DATASHEET = 989e12  # FLOP/s of an H100 SXM, dense bfloat16
# As they come: no search for the fastest of a library's matmuls. Searching takes memory that stays with the process, and a minute.
FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
LONG, NO_GRAPHS = 65_536, "--xla_gpu_enable_command_buffer="  # tokens; a recorded graph needs memory that such a step leaves to nobody


@dataclasses.dataclass
class Process:
    options: dict
    popen: subprocess.Popen
    lines: queue.Queue
    log: pathlib.Path


def start(options: dict, folder: pathlib.Path) -> Process:
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_CLIENT_MEM_FRACTION": "0.94",
        "PYTHONUNBUFFERED": "1",
    }
    if options["smoke"]:
        environment["JAX_PLATFORMS"] = "cpu"
    else:
        flags = f"{FLAGS} {NO_GRAPHS}" if options.get("tokens", 0) > LONG else FLAGS
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    log = folder / f"{options['name'].replace('/', '_')}.log"
    command = [sys.executable, "-m", "experiments.bench_scale_cases", json.dumps(options)]
    with log.open("w") as file:
        popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment,
            cwd=pathlib.Path(__file__).parents[1],
        )  # fmt: skip
    lines: queue.Queue = queue.Queue()

    def read() -> None:
        for line in popen.stdout:
            if line.startswith("{"):
                lines.put(json.loads(line))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return Process(options, popen, lines, log)


def end(process: Process) -> None:
    process.popen.kill()
    try:
        process.popen.wait(10)
    except subprocess.TimeoutExpired:  # a kernel that hangs keeps its process: the others go on
        print(f"{process.options['name']} does not end", flush=True)


def failure(process: Process, what: str) -> dict:
    text = process.log.read_text(errors="replace").strip().splitlines()
    telling = [line for line in text if "Error" in line or "RESOURCE_EXHAUSTED" in line or "error:" in line]
    return {"error": what, "message": " | ".join((telling or text)[-3:])[:1500]}


def finish(process: Process, ready_by: float, limit: float) -> dict:
    """The row of a case: waits until it has compiled, lets it run for at most `limit` seconds; what came before a failure stays in it."""
    row = {"name": process.options["name"], **{k: process.options[k] for k in ("attention", "moe") if process.options["case"] == "stage"}}
    try:
        first = process.lines.get(timeout=max(ready_by - time.monotonic(), 0.1))
        if first is None:
            row |= failure(process, "did not compile")
        else:
            row |= first
            process.popen.stdin.write("go\n")
            process.popen.stdin.flush()
            end_by = time.monotonic() + limit
            while (part := process.lines.get(timeout=max(end_by - time.monotonic(), 0.1))) is not None:
                row |= part
            if process.popen.wait(10):
                row |= failure(process, "did not finish")
    except queue.Empty:
        row |= failure(process, "ran out of time")
    except (OSError, subprocess.TimeoutExpired) as gone:
        row |= failure(process, f"ended early: {gone}")
    end(process)
    return row


def choose(rows: list[dict], kind: str, preferred: str, apart: tuple[str, ...]) -> str:
    """The fastest correct form; the preferred one, already compiling, unless another is faster by a quarter. apart: measured only."""
    took = {r["name"].split("/")[1]: r["packed_seconds"] for r in rows if r["name"].startswith(f"{kind}/") and r.get("correct")}
    took = {name: s for name, s in took.items() if name not in apart} or took
    if not took:
        return preferred
    best = min(took, key=took.get)
    return preferred if took.get(preferred, float("inf")) < 1.25 * took[best] else best


def describe(row: dict, peak: float) -> str:
    wrong = f"{row['error']}: {row['message'][-400:]}" if "error" in row else ""
    if "packed" not in row and wrong:
        return f"{row['name']:18} {wrong} { ({k: v for k, v in row.items() if k not in ('name', 'error', 'message')}) }"
    if "packed" not in row:
        return f"{row['name']:18} " + ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "name"
        )
    line = f"{row['name']:18} {row['attention']} {row['moe']} compiled in {sum(row['compile_seconds'].values()):.0f} s"
    for name in ("packed", "whole"):
        if name in row:
            r = row[name]
            line += f"; {name}: {r['seconds']:.3f} s ({r['steps']} steps), {r['tokens_per_second']:,.0f} tokens/s, "
            line += f"{r['flops_per_second'] / peak:.1%} of measured peak, {r['flops_per_second'] / DATASHEET:.1%} of 989"
    gigabytes = [f"{key} {row[key] / 1e9:.1f} GB" for key in ("planned_bytes", "peak_bytes_in_use") if key in row]
    return f"{line}; {', '.join(gigabytes)}; loss {row['packed']['loss']:.3f} {wrong}"


def measure(args: argparse.Namespace, rows: list[dict], note: Callable[[dict], None]) -> None:
    began, deadline = time.monotonic(), time.monotonic() + args.budget
    folder = pathlib.Path(args.logs)
    folder.mkdir(parents=True, exist_ok=True)
    base = {"smoke": args.smoke, "attention": args.attention, "moe": args.moe, "block": 32 if args.smoke else 512}
    forms = [("attention", f) for f in (("flash_triton", "chunked") if args.smoke else ("flash", "flash_triton", "chunked"))]
    forms += [("experts", f) for f in ("grouped", "blocked", "ragged")]
    forms = [] if args.no_kernels else forms
    first = [{"name": "peak", "case": "peak"}, *({"name": f"{kind}/{form}", "case": kind, "form": form} for kind, form in forms)]
    stages = [
        {"name": f"{stage}/{n}", "case": "stage", "stage": stage, "tokens": n, "seconds": 6} for n in args.tokens for stage in args.stage
    ]
    later: list[Process] = []
    running: list[Process] = []
    try:
        running = [start({**base, **o}, folder) for o in first]
        # The steps compile meanwhile, with the forms that are expected to win.
        later = [] if args.smoke else [start({**base, **o}, folder) for o in stages]
        while running:
            note(finish(running.pop(0), began + 0.35 * args.budget, 20))
        chosen = {
            "attention": choose(rows, "attention", base["attention"], ("chunked",)),
            "moe": choose(rows, "experts", base["moe"], ("ragged",)),
        }
        if args.smoke:
            chosen = {name: base[name] for name in chosen}
        print(f"[{time.monotonic() - began:.0f} s] the steps run with {chosen}", flush=True)
        if not later or chosen != {name: base[name] for name in chosen}:
            for process in later:
                end(process)
            later = [start({**base, **o, **chosen}, folder) for o in stages]
        if not args.no_align:
            later.append(start({**base, "name": "align", "case": "align"}, folder))
        while later:
            left = max(deadline - time.monotonic(), 1)
            long = later[0].options.get("tokens", 0) > LONG
            note(finish(later.pop(0), time.monotonic() + min(left, 100), min(70 if long else 30, left)))
    finally:
        for process in running + later:
            end(process)
    print(f"[{time.monotonic() - began:.0f} s] all", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=list(LENGTHS))
    parser.add_argument("--stage", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--budget", type=float, default=235, help="seconds; what has not run by then is a row that says so")
    parser.add_argument("--out", help="file of JSON, written again after every case")
    parser.add_argument("--logs", default="/tmp/bench_scale", help="folder for what the cases print")
    parser.add_argument("--attention", default="flash", help="kernel of the steps, unless it is found wrong or slow")
    parser.add_argument("--moe", default="grouped", help="form of the experts, likewise")
    parser.add_argument("--no-kernels", action="store_true", help="without the kernels' check: the steps run with the two above")
    parser.add_argument("--no-align", action="store_true", help="without kernels/vocab_align")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU: kernels interpreted or replaced by plain forms")
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.budget, args.attention, args.moe = [256], max(args.budget, 600), "chunked", "blocked"
        print(
            "smoke: a CPU; cuDNN left out, Triton's kernel interpreted, 'grouped' by lax.ragged_dot, the steps with 'chunked' and 'blocked'"
        )
    rows: list[dict] = []

    def note(row: dict) -> None:
        rows.append(row)
        peak = next((r["matmul_flops_per_second"] for r in rows if "matmul_flops_per_second" in r), DATASHEET)
        print(describe(row, peak), flush=True)
        if args.out:
            pathlib.Path(args.out).write_text(json.dumps({"argv": sys.argv[1:], "rows": rows}, indent=1))

    measure(args, rows, note)


if __name__ == "__main__":
    main()
