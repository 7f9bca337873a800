"""Parameters folders: ``params/`` and ``model.json`` side by side, from which a run can start, and Hugging Face folders <-> them.

An import makes one, every training stage leaves one (``runs/<name>/stages/<stage>``).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax

from .. import checkpoint
from ..config import ConfigError
from ..models import hf, hf_config, hf_files, hf_names, transformer
from ..models.config import ModelConfig
from ..types import Params

MODEL, FORMAT = "model.json", "a1jax.model/1"


def write_model(folder: pathlib.Path, cfg: ModelConfig, facts: dict[str, Any]) -> None:
    """model.json: the configuration, and facts that JSON can hold (where the weights came from)."""
    text = json.dumps({"format": FORMAT, "model": dataclasses.asdict(cfg), "facts": facts}, indent=1)
    part = folder / "model.part"
    part.write_text(text + "\n")
    part.rename(folder / MODEL)


def read_model(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """(configuration, facts) of a parameters folder. Raises ConfigError where it is none."""
    file = folder / MODEL
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    if not file.is_file() or not (folder / "params").is_dir():
        raise ConfigError(f"{folder}: no parameters folder ({MODEL} and params/), as `a1jax import` and every finished stage leave one")
    try:
        found = json.loads(file.read_text())
        fields = found["model"]
        facts = dict(found["facts"])
        if found["format"] != FORMAT:
            raise ConfigError(f"{file}: format is {found['format']!r}, wanted {FORMAT!r}")
        return ModelConfig(**{**fields, "layer_types": tuple(fields["layer_types"])}), facts
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: not the model of a parameters folder ({error})") from None


def check_initial(folder: pathlib.Path, cfg: ModelConfig) -> None:
    """Raises ConfigError where a model of ``cfg`` cannot start from the parameters in ``folder``; fields of training may differ."""
    wrong = hf_config.differences(read_model(folder)[0], cfg)
    if wrong:
        raise ConfigError(f"initial={folder} is another model than cfg.model: {'; '.join(wrong)}; set cfg.model to it")


def import_hf(source: pathlib.Path, folder: pathlib.Path, dtype: str | None = None) -> str:
    """Reads a Hugging Face folder into a new parameters folder, tokenizer and templates beside it; returns the summary to print.

    dtype: "float32" or "bfloat16" to convert to; None: as stored. Raises ConfigError as hf.load does, or where ``folder`` holds something.
    """
    began = time.perf_counter()
    found = hf.open_checkpoint(source)  # all that can be wrong with it, before anything is made
    with hf_files.new_folder(folder) as part:
        params, cfg = hf.load(source, dtype=dtype)
        checkpoint.save_params(part / "params", params)
        hf.copy_companions(source, part)
        write_model(part, cfg, {"source": str(source.resolve()), "skipped": list(found.skipped)})
    read = sum(found.stored[piece.name].size for piece in found.pieces)
    lines = [f"imported {_summary(cfg, len(found.pieces), read, began)} into {folder}"]
    if found.skipped:
        size = sum(found.stored[name].size for name in found.skipped)
        lines[0] += f"; skipped {len(found.skipped)} tensors ({_bytes(size)}):"
        lines += [f"  {line}" for line in hf_names.grouped(sorted(found.skipped))]
    return "\n".join(lines)


def export_hf(run: pathlib.Path, path: pathlib.Path, stage: str | None = None, source: pathlib.Path | None = None) -> str:
    """Writes the parameters of an imported folder, of a stage's folder or of a run (with the name of a stage where it has several) as a
    Hugging Face folder; returns the summary to print. source: see hf.save; without it the text model alone, with the files that lie beside
    the parameters. Raises ConfigError as hf.save does, or where there are no parameters."""
    began = time.perf_counter()
    folder = find(run, stage)
    cfg, facts = read_model(folder)
    hf_files.check_new(path)  # before the weights are read
    params = checkpoint.load_params(folder / "params", checkpoint.stored_params(folder / "params"))
    kinds = [(leaf.size, str(leaf.dtype)) for leaf in jax.tree.leaves(params)]
    cfg = dataclasses.replace(cfg, param_dtype=max(kinds)[1])
    names = hf.save(path, params, cfg, source, beside=facts.get("initial") or folder)
    written = sum(entry.size for name, entry in hf_files.read_folder(path).items())
    line = f"exported {_summary(cfg, len(names), written, began)} into {path}"
    if source is None and facts.get("skipped"):
        line += f"; left out {len(facts['skipped'])} tensors that are not the text model's, --source {facts['source']} keeps them"
    return line


def find(run: pathlib.Path, stage: str | None = None) -> pathlib.Path:
    """The parameters folder that is meant: ``run`` itself, or that of one of its finished stages. Raises ConfigError naming the stages."""
    if (run / MODEL).is_file():
        if stage is not None:
            raise ConfigError(f"{run}: a parameters folder, it has no stages; leave out --stage {stage}")
        return run
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder")
    stages = sorted(file.parent.name for file in run.glob(f"stages/*/{MODEL}") if (file.parent / "done.json").is_file())
    if stage in stages or (stage is None and len(stages) == 1):
        return run / "stages" / (stage or stages[0])
    if not stages:
        raise ConfigError(f"{run}: no parameters in it (no {MODEL} and no finished stage)")
    what = f"no finished stage {stage!r}" if stage else f"{len(stages)} finished stages"
    raise ConfigError(f"{run}: {what}; give --stage, one of {', '.join(stages)}")


def load(folder: pathlib.Path, abstract: Params) -> Params:
    """The parameters of a parameters folder, of the types and on the devices that ``abstract`` says."""
    return checkpoint.load_params(folder / "params", abstract)


def _summary(cfg: ModelConfig, tensors: int, size: int, began: float) -> str:
    total, active = transformer.parameter_counts(cfg)
    seconds = time.perf_counter() - began
    return f"{total:,} parameters ({active:,} active), {tensors:,} tensors, {_bytes(size)} in {seconds:.1f} s"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
