"""What a Hugging Face checkpoint folder holds, known from config.json and the headers of its files, and all that can be wrong with it."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import numpy as np

from a1jax.config import ConfigError
from a1jax.models import hf_files, hf_names
from a1jax.models.config import ModelConfig
from a1jax.models.hf_config import read_config
from a1jax.models.hf_files import DTYPES, Stored
from a1jax.models.hf_names import PathKeys, Piece


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, known from its headers alone."""

    folder: pathlib.Path
    cfg: ModelConfig
    stored: dict[str, Stored]  # every tensor, in the order it lies in
    pieces: list[Piece]  # those of the text model
    skipped: tuple[str, ...]  # names of the others: vision tower, multi-token prediction

    def dtypes(self) -> dict[PathKeys, np.dtype]:
        """Type of every leaf: bfloat16 where all of its tensors are, else float32, which holds all three types exactly."""
        kinds: dict[PathKeys, set[str]] = {}
        for piece in self.pieces:
            kinds.setdefault(piece.path, set()).add(self.stored[piece.name].dtype)
        return {path: DTYPES["BF16" if kind == {"BF16"} else "F32"] for path, kind in kinds.items()}


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads config.json and all headers, no weights. ``cfg.param_dtype`` is the type of most of the stored numbers.

    Raises ConfigError for what load() refuses.
    """
    folder = pathlib.Path(path)
    cfg = read_config(folder)
    stored = hf_files.read_folder(folder)
    _refuse_quantised(folder, stored)
    pieces = hf_names.pieces(cfg, *hf_names.layout(stored))
    wanted = {piece.name for piece in pieces}
    skipped = tuple(name for name in stored if name not in wanted and name.startswith(hf_names.SKIPPED))
    _compare(folder, pieces, {name: tensor for name, tensor in stored.items() if name not in skipped})
    narrow = sum(stored[piece.name].size for piece in pieces if stored[piece.name].dtype == "BF16")
    wide = sum(stored[piece.name].size for piece in pieces if stored[piece.name].dtype != "BF16")
    dtype = "bfloat16" if 2 * narrow > wide else "float32"
    return Checkpoint(folder, dataclasses.replace(cfg, param_dtype=dtype, compute_dtype=dtype), stored, pieces, skipped)


def _refuse_quantised(folder: pathlib.Path, stored: dict[str, Stored]) -> None:
    """Raises ConfigError where weights of the text model are quantised."""
    ours = [tensor for name, tensor in stored.items() if not name.startswith(hf_names.SKIPPED)]
    scales = [tensor.name for tensor in ours if tensor.name.endswith(hf_names.QUANTISED)]
    narrow = sorted({tensor.dtype for tensor in ours if tensor.dtype not in DTYPES and tensor.dtype not in ("F64", "I64", "I32", "BOOL")})
    if scales or narrow:
        what = [f"tensors of type {', '.join(narrow)}"] if narrow else []
        what += [f"{'; '.join(hf_names.grouped(scales))}"] if scales else []
        raise ConfigError(f"{folder}: quantised weights are not read ({', '.join(what)}); use the bf16 or float32 checkpoint")


def _compare(folder: pathlib.Path, pieces: list[Piece], stored: dict[str, Stored]) -> None:
    """Raises one ConfigError with every tensor that is missing, unknown, of another shape or of a type that is not read."""
    wanted = {piece.name: piece for piece in pieces}
    groups: dict[str, list[str]] = {"missing": [name for name in wanted if name not in stored]}
    groups["unknown"] = [name for name in stored if name not in wanted]
    for name, piece in wanted.items():
        if name in stored and stored[name].shape != piece.shape:
            groups.setdefault(f"{list(stored[name].shape)} where config.json asks for {list(piece.shape)}", []).append(name)
        if name in stored and stored[name].dtype not in DTYPES:
            groups.setdefault(f"of type {stored[name].dtype}, which is not read", []).append(name)
    lines = [f"{what}: {', '.join(hf_names.grouped(names))}" for what, names in groups.items() if names]
    if lines:
        raise ConfigError(f"{folder}: the weights are not those of config.json; {'; '.join(lines)}")
