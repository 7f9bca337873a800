"""Weights in and out: Hugging Face checkpoints of Qwen3.5-MoE <-> our parameters, streamed.

Neither direction ever holds more than the parameters and a few chunks beside them: files are read and written by rows, and under a
mesh a process reads only the rows that its own devices hold. Names and turns are those of hf_names, config.json is hf_config's.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from a1jax import params as param_specs
from a1jax.config import ConfigError
from a1jax.models import hf_config, hf_files, hf_names, transformer
from a1jax.models.config import ModelConfig
from a1jax.models.hf_checkpoint import Checkpoint, open_checkpoint
from a1jax.models.hf_config import read_config
from a1jax.models.hf_files import DTYPES, Entry, Stored
from a1jax.models.hf_names import Box, PathKeys, Piece

__all__ = ["COMPANIONS", "Checkpoint", "copy_companions", "load", "open_checkpoint", "read_config", "save"]

LOG = logging.getLogger(__name__)
PathLike = str | os.PathLike[str]
COMPANIONS = (  # what lies beside the weights and belongs to the model: tokenizer, templates, defaults of sampling, processors, terms
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "LICENSE",
)  # fmt: skip
TURN_ROWS = 64  # rows turned at a time: both sides of the copy then stay in the cache, which makes it five times faster


def load(path: PathLike, mesh: Mesh | None = None, dtype: str | None = None) -> tuple[dict, ModelConfig]:
    """(parameters, configuration) of the checkpoint folder ``path``: config.json and safetensors, sharded or not, text or multimodal.

    mesh: leaves are cut as params.shardings says, each device getting its part straight from the files; None: on the first device.
    dtype: "float32" or "bfloat16", the ``param_dtype`` to convert to as the specs say (the recurrence's vectors are float32 always);
    None: every leaf keeps the type that it is stored in.
    The configuration is set for training at the published sizes (remat="block", attention_chunk=512), see read_config.
    Raises ConfigError, one line each: no such folder, config or shard; a file cut off; a config or a type that this model does not
    compute; all tensors that are missing, unknown or of another shape, before any weight is read.
    """
    found = open_checkpoint(path)
    if found.skipped:
        LOG.info("%s: %d tensors skipped: %s", path, len(found.skipped), "; ".join(hf_names.grouped(sorted(found.skipped))))
    cfg, dtypes = found.cfg, found.dtypes()
    if dtype is not None:
        if str(dtype) not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype is {dtype!r}: choose float32 or bfloat16")
        cfg = dataclasses.replace(cfg, param_dtype=dtype, compute_dtype=dtype)
        dtypes = {path: np.dtype(spec.dtype) for path, spec in hf_names.flat(transformer.specs(cfg)).items()}
    specs = transformer.specs(cfg)
    alone = SingleDeviceSharding(jax.local_devices()[0])
    shardings = hf_names.flat(param_specs.shardings(specs, mesh)) if mesh is not None else {}
    parts: dict[PathKeys, list[Piece]] = {}
    for piece in found.pieces:
        parts.setdefault(piece.path, []).append(piece)

    def leaf(path, spec):
        path = tuple(key.key for key in path)
        return _read_leaf(parts[path], found.stored, spec.shape, dtypes[path], shardings.get(path, alone))

    return jax.tree_util.tree_map_with_path(leaf, specs), cfg


def _read_leaf(pieces: list[Piece], stored: dict[str, Stored], shape: tuple[int, ...], dtype: np.dtype, sharding: Any) -> jax.Array:
    """One leaf, from every piece of it that reaches into a part which a device of this process holds."""
    boxes: dict[Any, Box] = {
        device: tuple(part.indices(n)[:2] for part, n in zip(parts, shape, strict=True))
        for device, parts in sharding.addressable_devices_indices_map(shape).items()
    }
    buffers = {box: _aligned(tuple(end - begin for begin, end in box), dtype) for box in boxes.values()}
    for piece in pieces:
        _read_piece(piece, stored[piece.name], buffers)
    arrays = [jax.device_put(buffers[box], device) for device, box in boxes.items()]  # a CPU device takes the buffer as it is
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, arrays))


def _read_piece(piece: Piece, tensor: Stored, buffers: dict[Box, np.ndarray]) -> None:
    """Copies a tensor into every buffer that its box meets; rows that meet none are not read."""
    targets = []  # (view of a buffer, first row, last row, the other dimensions' slices), all in the checkpoint's order
    for box, buffer in buffers.items():
        meet = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(piece.box, box, strict=True)]
        if all(begin < end for begin, end in meet):
            into = buffer[tuple(slice(begin - c, end - c) for (begin, end), (c, _) in zip(meet, box, strict=True))]
            of = [(meet[i][0] - piece.box[i][0], meet[i][1] - piece.box[i][0]) for i in piece.axes]
            targets.append((piece.oriented(into), *of[0], tuple(slice(*pair) for pair in of[1:])))
    if not targets:
        return
    begin, end = min(target[1] for target in targets), max(target[2] for target in targets)
    for row, chunk in tensor.rows(begin, end):
        chunk = chunk.reshape(len(chunk), *piece.sizes[1:])
        for into, first, last, rest in targets:
            lo, hi = max(first, row), min(last, row + len(chunk))
            if lo < hi:
                _copy(into[lo - first : hi - first], chunk[(slice(lo - row, hi - row), *rest)])


def _copy(into: np.ndarray, values: np.ndarray) -> None:
    """into[...] = values, of one shape, where one of the two may lie turned. Equal types are copied bit for bit."""
    if into.dtype != values.dtype:
        values = values.astype(into.dtype)
    elif into.dtype.itemsize == 2:
        into, values = into.view(np.uint16), values.view(np.uint16)  # numpy copies integers faster than bfloat16
    if into.ndim < 2:
        into[...] = values
        return
    for row in range(0, into.shape[-2], TURN_ROWS):
        rows = (..., slice(row, row + TURN_ROWS), slice(None))
        into[rows] = values[rows]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array on a border of 64 bytes: what a CPU device uses without copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def copy_companions(source: PathLike, folder: PathLike) -> None:
    """Copies what belongs to the model beside its weights (COMPANIONS) from one folder to another."""
    for name in COMPANIONS:
        if (pathlib.Path(source) / name).is_file():
            shutil.copyfile(pathlib.Path(source) / name, pathlib.Path(folder) / name)


def save(
    path: PathLike,
    params: dict,
    cfg: ModelConfig,
    source: PathLike | None = None,
    shard_bytes: int | float = 5e9,
    beside: PathLike | None = None,
) -> list[str]:
    """Writes parameters as a Hugging Face folder: config.json, shards of at most ``shard_bytes``, index. Returns the names written.

    source: the checkpoint folder that this model came from. Then names, prefix, layout of the experts, the type of every tensor and
    config.json are the source's; what load() skips and the files beside the weights are copied as they are. None: the text model alone
    with fused experts, every tensor of the type its leaf has, and the files that lie in ``beside`` (tokenizer, templates). An embedding
    that the model scales is written scaled, with a separate unembedding, as their model does not scale.
    The folder appears whole or not at all. Raises ConfigError where it exists and is not empty, where params are not those of cfg, or
    where the source is another architecture.
    """
    if cfg.scale_embeddings:
        params, cfg = _unscaled(params, cfg)
    leaves = hf_names.flat(params)
    _check_tree(leaves, cfg)
    found = None if source is None else open_checkpoint(source)
    if found is not None and (wrong := hf_config.differences(found.cfg, cfg)):
        raise ConfigError(f"{source}: not the architecture that is to be written ({'; '.join(wrong)})")
    pieces = hf_names.pieces(cfg) if found is None else found.pieces
    reader = _Slices(leaves)
    entries = []
    for piece in pieces:
        kind = _code(leaves[piece.path].dtype, piece.name) if found is None else found.stored[piece.name].dtype
        size = math.prod(piece.shape) * DTYPES[kind].itemsize
        entries.append(Entry(piece.name, kind, piece.shape, size, lambda piece=piece, kind=kind: reader.rows(piece, DTYPES[kind])))
    for name in found.skipped if found is not None else ():
        tensor = found.stored[name]
        entries.append(Entry(name, tensor.dtype, tensor.shape, tensor.size, tensor.raw))
    with hf_files.new_folder(pathlib.Path(path)) as folder:
        if found is not None:
            shutil.copyfile(found.folder / "config.json", folder / "config.json")
        else:
            (folder / "config.json").write_text(json.dumps(hf_config.text_config(cfg), indent=2) + "\n")
        if found is not None or beside is not None:
            copy_companions(found.folder if found is not None else beside, folder)
        hf_files.write_folder(folder, entries, int(shard_bytes))
    return [entry.name for entry in entries]


class _Slices:
    """Parts of leaves on the host, as rows of tensors; one slice of one leaf at a time. A row is good until the next is asked for."""

    def __init__(self, leaves: dict[PathKeys, Any]):
        self.leaves, self.key, self.slice = leaves, None, None
        self.buffer = np.empty(0, np.uint8)  # kept: what is freed in pieces of this size, malloc keeps

    def rows(self, piece: Piece, dtype: np.dtype) -> Iterator[memoryview]:
        key = (piece.path, piece.box[0] if piece.path[0] == "blocks" else None)
        if key != self.key:
            self.slice = None  # before the next one comes
            self.key, self.slice = key, _on_host(self.leaves[piece.path], key[1])
        box = piece.box if key[1] is None else ((0, 1), *piece.box[1:])
        values = piece.oriented(self.slice[tuple(slice(*pair) for pair in box)])
        width = math.prod(values.shape[1:]) * dtype.itemsize
        step = max(1, hf_files.CHUNK // width)
        if len(self.buffer) < step * width:
            self.buffer = np.empty(step * width, np.uint8)
        for row in range(0, len(values), step):
            part = values[row : row + step]
            raw = self.buffer[: len(part) * width]
            _copy(raw.view(dtype).reshape(part.shape), part)
            yield memoryview(raw)


def _on_host(leaf: Any, block: tuple[int, int] | None) -> np.ndarray:
    """A leaf, or one block of it (its first dimension cut to one), put together from its parts on the devices. Parts that lie on a CPU
    are only looked at, and of other devices' parts no more than the block is fetched."""
    if isinstance(leaf, np.ndarray):
        return leaf[slice(*block) if block else ...]
    if not leaf.is_fully_addressable:
        raise ConfigError("these parameters are spread over several processes: export what one of them has stored")
    parts = []
    for part in (part for part in leaf.addressable_shards if part.replica_id == 0):
        start = (part.index[0].start or 0) if block else 0
        if block is None or start <= block[0] < start + part.data.shape[0]:
            parts.append((part.index[1:] if block else part.index, _fetch(part.data, block and block[0] - start)))
    if len(parts) == 1:
        return parts[0][1]
    out = np.empty((1, *leaf.shape[1:]) if block else leaf.shape, leaf.dtype)
    for index, values in parts:
        out[(slice(None), *index) if block else index] = values
    return out


def _fetch(data: jax.Array, row: int | None) -> np.ndarray:
    if row is None:
        return np.asarray(data)
    if next(iter(data.devices())).platform == "cpu":
        return np.asarray(data)[row : row + 1]
    return np.asarray(jax.lax.dynamic_index_in_dim(data, np.int32(row), 0))  # one program for all rows


def _unscaled(params: dict, cfg: ModelConfig) -> tuple[dict, ModelConfig]:
    """The same function of tokens without scaled embeddings: the scale goes into the table, the unembedding gets a table of its own."""
    table = params["embed_tokens"]
    params = {
        **params,
        "embed_tokens": table * np.asarray(math.sqrt(cfg.d_model), table.dtype),
        "lm_head": transformer.unembed(params, cfg),
    }
    return params, dataclasses.replace(cfg, scale_embeddings=False, tie_embeddings=False)


def _code(dtype: Any, name: str) -> str:
    for code, known in DTYPES.items():
        if known == dtype:
            return code
    raise ConfigError(f"{name} is {dtype}: only {', '.join(str(known) for known in DTYPES.values())} are written")


def _check_tree(leaves: dict[PathKeys, Any], cfg: ModelConfig) -> None:
    specs = hf_names.flat(transformer.specs(cfg))
    wrong = [f"{'.'.join(path)} is {'missing' if path in specs else 'unknown'}" for path in specs.keys() ^ leaves.keys()]
    for path in specs.keys() & leaves.keys():
        if tuple(leaves[path].shape) != specs[path].shape:
            wrong.append(f"{'.'.join(path)} is {list(leaves[path].shape)}, wanted {list(specs[path].shape)}")
    if wrong:
        raise ConfigError(f"these are not the parameters of this configuration: {'; '.join(sorted(wrong))}")
