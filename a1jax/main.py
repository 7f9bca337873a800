"""The command line: parse and dispatch. ``a1jax run FILE[:arg]``, ``a1jax compile FILE[:arg] --topology NAME``,
``a1jax generate --domain D ...``, ``a1jax prepare SRC... --out DIR --tokenizer PATH``, ``a1jax import HF_DIR RUN_DIR``,
``a1jax export RUN_DIR HF_DIR``, ``a1jax vocab-map STUDENT TEACHER -o FILE``, ``a1jax show RUN --task ID`` and ``a1jax report RUN...``.

Exit codes: 0 done, 2 a mistake of the user's (one line on stderr), 130 interrupted by Ctrl-C, 143 by SIGTERM (saved, one line), 75 another
process was lost (one line), 1 anything else (a traceback, or, of compile, a program that does not fit). After 75, 130 and 143 the same
command goes on. Of several processes each has its own, and one that fails leaves at once.
Imports are inside the functions, so that ``--help`` does not wait for jax.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

from a1jax import __version__, interruption


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. argv: the words after ``a1jax``, by default those of the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    try:
        return run(args, words) if args.command == "run" else COMMANDS[args.command](args)
    except ValueError as error:
        if not isinstance(error, _user_errors()):
            return _leave(error)
        print(f"a1jax: {' '.join(str(error).split())}", file=sys.stderr)
        return _leave(2)
    except KeyboardInterrupt:
        print("a1jax: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return _leave(130)
    except interruption.Interrupted as stop:
        print(f"a1jax: {stop}", file=sys.stderr)
        if argv is None:
            interruption.end_within(5, stop.code)
        return _leave(stop.code)
    except Exception as error:
        return _leave(error)


def _leave(reason: int | Exception) -> int:
    """The exit code, or the error raised on; one of several processes ends here, as its orderly end would wait for the others."""
    distributed = sys.modules.get("a1jax.distributed")
    if distributed is not None and distributed.several():
        if isinstance(reason, Exception):
            traceback.print_exception(reason)
        distributed.leave(reason if isinstance(reason, int) else 1)
    if isinstance(reason, Exception):
        raise reason
    return reason


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Loads, overrides and checks the config, then calls ``cfg.main(cfg, workdir)``. Writes nothing before all of that is good.

    Several processes join in between; the first one writes and prints, in a folder that all of them see."""
    from a1jax import config, config_files, distributed, lost_process, provenance

    cfg = config.override(config.load(args.file), args.set)
    config.check(cfg)
    for name, kind in (("name", str), ("main", config.Binding)):
        if not isinstance(getattr(cfg, name, None), kind):
            raise config.ConfigError(f"{args.file}: its config needs a field {name!r} holding a {kind.__name__}")
    config_files.source(cfg)  # refuses a config that could not be saved
    workdir = pathlib.Path(args.workdir or pathlib.Path("runs") / cfg.name)
    others = distributed.arguments(args.coordinator, args.processes, args.process)
    if others is not None and not distributed.joined():
        distributed.join(others, lost_process.SECONDS)
        lost_process.watch()
    distributed.by_first(lambda: _refuse_another_run(cfg, workdir))
    entry = provenance.collect(words, getattr(cfg, "seed", None))

    new = not (workdir / "config.py").exists()

    def begin() -> None:
        if new or provenance.read(workdir).get("outcome") != "finished":  # a finished run is not run again: its mesh is the one it ran on
            config.save(cfg, workdir / "config.py")
        provenance.start(workdir, entry)

    distributed.by_first(begin)
    try:
        if not (workdir / "config.py").exists():
            raise config.ConfigError(
                f"{workdir}: this process does not see what process 0 wrote there; give a --workdir that all hosts share"
            )
        with interruption.listening(), contextlib.ExitStack() as quiet:
            if not distributed.is_first():
                quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
                logging.getLogger("a1jax").setLevel(logging.ERROR)
            cfg.main(cfg, workdir)
    except BaseException as error:
        if distributed.is_first():
            stopped = isinstance(error, KeyboardInterrupt | interruption.Interrupted)
            provenance.finish(workdir, "interrupted" if stopped else f"failed: {type(error).__name__}: {error}")
            if new and isinstance(error, _user_errors()):
                _take_back(workdir)
        lost_process.part(error)
        raise
    if distributed.is_first():
        provenance.finish(workdir, "finished")
    return 0


def prepare(args: argparse.Namespace) -> int:
    """Turns trajectory files into a dataset folder and prints what was read and what was left out."""
    from a1jax.data import prepare as prepare_data

    print(prepare_data.prepare(args.sources, args.out, args.tokenizer, args.strict))
    return 0


def import_hf(args: argparse.Namespace) -> int:
    """Reads a Hugging Face checkpoint into a parameters folder and prints what it was."""
    from a1jax.stages import folders

    print(folders.import_hf(pathlib.Path(args.source), pathlib.Path(args.folder), args.dtype))
    return 0


def export_hf(args: argparse.Namespace) -> int:
    """Writes a parameters folder as a Hugging Face checkpoint and prints what it is."""
    from a1jax.stages import folders

    source = pathlib.Path(args.source) if args.source else None
    print(folders.export_hf(pathlib.Path(args.run), pathlib.Path(args.path), args.stage, source))
    return 0


def vocab_map(args: argparse.Namespace) -> int:
    """Builds the vocabulary map of two tokenizers, writes it and prints its counts."""
    from a1jax.align import byte_table, roles, vocab_map
    from a1jax.config import ConfigError
    from a1jax.data import tokenizer

    tables = []
    for path, size, own in ((args.student, args.student_size, args.student_roles), (args.teacher, args.teacher_size, args.teacher_roles)):
        tables.append(byte_table.of(tokenizer.load(path), size, roles.read(own) if own else None))
    made = vocab_map.build(*tables, args.mode)
    try:
        vocab_map.save(made, args.output)
    except OSError as error:
        raise ConfigError(f"{args.output} cannot be written ({error.strerror}): choose another -o FILE") from None
    print(made.table())
    return 0


def show(args: argparse.Namespace) -> int:
    """Prints one kept run turn by turn and writes its page, or lists what there is to read."""
    from a1jax.analysis import show as show_run

    html = pathlib.Path(args.html) if args.html else None
    show_run.run(pathlib.Path(args.run), None if args.list else args.task, args.model, html)
    return 0


def report(args: argparse.Namespace) -> int:
    """Writes the page of each run or sweep, finished or not, and prints the table of all runs that have judged a model."""
    from a1jax.analysis import page, seeds, sweep_page

    given = [pathlib.Path(folder) for folder in args.runs]
    for folder in filter(sweep_page.is_sweep, given):
        print(sweep_page.write(folder))
    folders = [folder for folder in given if not sweep_page.is_sweep(folder)]
    for folder in folders:
        print(page.write(folder))
    waiting = [folder for folder in folders if not page.read_scores(folder)]
    for folder in waiting:
        print(f"{folder}: no model has been judged yet")
    if len(waiting) < len(folders):
        print("\n" + seeds.table([folder for folder in folders if folder not in waiting]))
    return 0


def generate_runs(args: argparse.Namespace) -> int:
    """Writes runs of a domain's accepted tasks and prints their statistics."""
    from a1jax.stages import generate

    options = (args.seed, args.split, args.tokenizer, args.failures, args.set, args.tools)
    print(generate.generate(args.domain, args.tasks, args.horizon, args.out, *options))
    return 0


def compile_programs(args: argparse.Namespace) -> int:
    """Compiles the programs of an experiment's stages for a topology of TPUs and prints what they take; 1 where one does not fit."""
    import json

    from a1jax.analysis import chips

    chips.prepare_environment()
    from a1jax import config
    from a1jax.analysis import compile_report, compile_sweep, compile_text
    from a1jax.stages.pipeline import Experiment
    from a1jax.stages.programs import STAGES

    cfg = config.override(config.load(args.file), args.set)
    config.check(cfg)
    if not isinstance(cfg, Experiment):
        raise config.ConfigError(f"{args.file}: a {type(cfg).__name__}; compile needs an Experiment of three stages")
    stages = (args.stage,) if args.stage else STAGES[:-1]
    if args.sweep is not None:
        found = compile_sweep.sweep(cfg, args.topology, stages, args.sweep)
        print(json.dumps(found) if args.json else compile_text.table(found["sweep"]))
        return 0 if any(row.get("fits") for row in found["sweep"]) else 1
    found = compile_report.report(cfg, args.topology, stages)
    print(json.dumps(found) if args.json else compile_text.everything(found["programs"]))
    return 0 if found["fits"] else 1


COMMANDS = {
    "compile": compile_programs,
    "generate": generate_runs,
    "prepare": prepare,
    "import": import_hf,
    "export": export_hf,
    "vocab-map": vocab_map,
    "show": show,
    "report": report,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="a1jax", description="Trains long-horizon agents in three stages.")
    parser.add_argument("--version", action="version", version=f"a1jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    each = commands.add_parser("run", help="run an experiment file or go on with it", description="Runs or goes on with an experiment.")
    each.add_argument("file", metavar="FILE[:arg]", help="a Python file with get_config(arg), or the config.py of an earlier run")
    each.add_argument("--workdir", metavar="DIR", help="where the run keeps everything (default: runs/<name of the experiment>)")
    each.add_argument(
        "--set", metavar="path=value", nargs="+", action="extend", default=[], help="change a value, e.g. sft.optimizer.learning_rate=1e-4"
    )
    several = each.add_argument_group("several processes", "the same command on every host; Slurm and GKE need none of these")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, or auto on Cloud TPU (or A1JAX_COORDINATOR)")
    several.add_argument("--processes", metavar="N", type=int, help="how many there are (or A1JAX_PROCESSES)")
    several.add_argument("--process", metavar="I", type=int, help="which one this is, from 0 (or A1JAX_PROCESS)")
    each = commands.add_parser(
        "compile", help="compile for TPUs that are not here", description="Compiles the programs of an experiment for a TPU topology."
    )
    each.add_argument("file", metavar="FILE[:arg]", help="an experiment of three stages")
    each.add_argument("--topology", metavar="NAME", required=True, help="chip and shape, e.g. v5p:4x4x8 (128 chips), v6e:16x16")
    each.add_argument("--stage", choices=("sft", "teacher", "distill", "rollout", "control"), help="default: all but control")
    each.add_argument("--set", metavar="path=value", nargs="+", action="extend", default=[], help="change a value of the experiment")
    each.add_argument("--json", action="store_true", help="one JSON object")
    each.add_argument(
        "--sweep",
        metavar="SHAPES",
        nargs="?",
        const="",
        help="all sensible mesh shapes, or those of a JSON list; sorted by tokens/s a chip",
    )
    each = commands.add_parser("generate", help="make trajectories of a domain", description="Accepted tasks of a domain -> trajectories.")
    each.format_help = _naming_families(each)
    each.add_argument("--domain", metavar="D", required=True, help="one of those below")
    each.add_argument("--tasks", metavar="N", type=int, required=True, help="runs to write")
    each.add_argument("--horizon", metavar="TOKENS", type=int, required=True, help="mean length of the finished runs, from the question on")
    each.add_argument("--out", metavar="FILE", required=True, help="the .jsonl or .jsonl.gz to write")
    each.add_argument("--seed", metavar="S", type=int, default=0, help="of the first task (default: 0)")
    each.add_argument("--split", choices=("train", "heldout"), default="train", help="default: train")
    each.add_argument("--tokenizer", metavar="PATH", help="counts the tokens (default: four characters are one)")
    each.add_argument("--tools", action="store_true", help="tool schemas and system messages count as tokens too")
    each.add_argument("--failures", metavar="SHARE", type=float, default=0.0, help="share of runs by a careless solver (default: 0)")
    each.add_argument("--set", metavar="field=value", nargs="+", action="extend", default=[], help="change a field of the domain")
    each = commands.add_parser("prepare", help="turn trajectories into a dataset", description="Turns trajectories into a dataset.")
    each.add_argument("sources", metavar="SRC", nargs="+", help="trajectory files (.jsonl, .jsonl.gz) or folders of them")
    each.add_argument("--out", metavar="DIR", required=True, help="folder of the dataset")
    each.add_argument("--tokenizer", metavar="PATH", required=True, help="a sentencepiece model or a tokenizer.json")
    each.add_argument("--strict", action="store_true", help="stop at the first record that cannot be used, instead of counting it")
    each = commands.add_parser("import", help="read a Hugging Face checkpoint", description="Hugging Face checkpoint -> parameters folder.")
    each.add_argument("source", metavar="HF_DIR", help="a folder with config.json and safetensors")
    each.add_argument("folder", metavar="RUN_DIR", help="the parameters folder to make: params/, model.json, tokenizer")
    each.add_argument("--dtype", choices=("float32", "bfloat16"), help="convert to it (default: as stored)")
    each = commands.add_parser(
        "export", help="write a Hugging Face checkpoint", description="Parameters folder -> Hugging Face checkpoint."
    )
    each.add_argument("run", metavar="RUN_DIR", help="an imported folder, a stage's folder, or a run")
    each.add_argument("path", metavar="HF_DIR", help="the checkpoint folder to make")
    each.add_argument("--stage", metavar="NAME", help="of a run with several finished stages")
    each.add_argument("--source", metavar="HF_DIR", help="the checkpoint it came from: keeps what is not the text model's, names and types")
    each = commands.add_parser(
        "vocab-map",
        help="map a teacher's vocabulary onto a student's",
        description="Builds the map of two tokenizers and prints its counts.",
    )
    for side in ("student", "teacher"):
        each.add_argument(
            side, metavar=side.upper(), help=f"the {side}'s tokenizer: tokenizer.json, SentencePiece model, rank file, or folder"
        )
        each.add_argument(f"--{side}-size", metavar="ROWS", type=int, help=f"rows of the {side}'s output matrix, if padded")
        each.add_argument(
            f"--{side}-roles", metavar="FILE", help="JSON {role: [id or spelling, ...]}: control roles the built-in table lacks"
        )
    each.add_argument("-o", "--output", metavar="FILE", required=True, help="the map to write (.npz)")
    each.add_argument("--mode", metavar="MODE", help="identity, two_sided, one_sided or shared (default: identity or two_sided)")
    each = commands.add_parser("show", help="read runs turn by turn", description="Prints a kept run and writes it as an HTML page.")
    each.add_argument("run", metavar="RUN", help="the folder of a run, or a trajectory file (.jsonl, .jsonl.gz)")
    each.add_argument("--task", metavar="ID", help="the task whose run to read, ID#2 the second of several; without it runs are listed")
    each.add_argument("--model", metavar="NAME", help="whose runs: an evaluation's name, admission/NAME or STAGE@STEP (default: any)")
    each.add_argument("--html", metavar="FILE", help="where to write the page (default: RUN/pages/, for a file nowhere)")
    each.add_argument("--list", action="store_true", help="list the runs that can be read")
    each = commands.add_parser(
        "report",
        help="write the page of runs or sweeps",
        description="Writes RUN/report.html, NAME.report.html of NAME.jsonl.gz; prints a table of all runs.",
    )
    each.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="folders of runs or sweeps, finished or not, or a sweep in one file; several seeds are pooled",
    )
    return parser


def _naming_families(parser: argparse.ArgumentParser) -> Callable[[], str]:
    """The parser's ``format_help``, with the families that there are: imported only when it is asked."""
    plain = parser.format_help

    def told() -> str:
        from a1jax.stages.generate import FAMILIES, NEEDS

        needs = "; ".join(f"{name} needs --set {what}" for name, what in NEEDS.items())
        parser.epilog = f"domains: {', '.join(FAMILIES)}; {needs}"
        return plain()

    return told


def _refuse_another_run(cfg: object, workdir: pathlib.Path) -> None:
    """Raises ConfigError where ``workdir`` is not a folder or holds a run of another config. On which mesh a run goes on is free, and which
    shard of a sweep this is."""
    from a1jax import config

    saved = workdir / "config.py"
    if workdir.exists() and not workdir.is_dir():
        raise config.ConfigError(f"{workdir}: not a folder; choose another --workdir")
    if not saved.exists():
        return
    try:
        before = config.load(str(saved))
    except config.ConfigError as error:
        raise config.ConfigError(f"{workdir}: its config cannot be compared ({error}); choose another --workdir") from error
    lines = [line for line in config.diff(before, cfg) if not line.startswith(("mesh.", "shard:", "only:", "only."))]
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise config.ConfigError(f"{workdir}: holds a run of another config ({'; '.join(lines[:3])}{more}); choose another --workdir")


def _take_back(workdir: pathlib.Path) -> None:
    """Removes a run that a mistake stopped before it had written anything, so that the corrected command may use its folder."""
    from a1jax import provenance

    if any(path.name not in ("config.py", provenance.FILE) and path.stat().st_size for path in workdir.rglob("*") if path.is_file()):
        return
    for path in sorted(workdir.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    workdir.rmdir()


def _user_errors() -> tuple[type[Exception], ...]:
    """The errors that are the user's. A module that was never imported raised nothing."""
    found = (("a1jax.config", "ConfigError"), ("a1jax.data.errors", "DataError"))
    return tuple(getattr(sys.modules[module], name) for module, name in found if module in sys.modules)


if __name__ == "__main__":
    sys.exit(main())
