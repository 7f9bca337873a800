"""Which tensor of a Hugging Face checkpoint is which part of which leaf of our parameters, and how it is turned."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from a1jax.models import transformer
from a1jax.models.config import ModelConfig

MULTIMODAL, TEXT = "model.language_model.", "model."
SKIPPED = ("model.visual.", "mtp.")  # vision tower, multi-token prediction: not part of this model
QUANTISED = ("_scale_inv", "weight_scale", "weight_packed", "qweight", "qzeros", "scales", "input_scale")  # how such tensors' names end

Box = tuple[tuple[int, int], ...]  # [begin, end) per dimension of a leaf
PathKeys = tuple[str, ...]  # keys from the root of the parameters to a leaf


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of the checkpoint: the box of a leaf that it holds, its dimensions being the leaf's ``axes``, in this order."""

    name: str
    shape: tuple[int, ...]  # in the checkpoint
    path: PathKeys
    box: Box
    axes: tuple[int, ...]
    layer: int  # -1: before the layers; number of layers: behind them

    def oriented(self, part: np.ndarray) -> np.ndarray:
        """A part of the leaf inside the box, as a view with the checkpoint's order of dimensions (without sizes of 1)."""
        fixed = [i for i in range(part.ndim) if i not in self.axes]
        return part.transpose(*fixed, *self.axes).reshape([part.shape[i] for i in self.axes])

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape in the checkpoint without the convolution's size of 1."""
        return tuple(self.box[i][1] - self.box[i][0] for i in self.axes)


def flat(tree: dict) -> dict[PathKeys, Any]:
    """Path -> leaf of a tree of nested dicts."""
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def pieces(cfg: ModelConfig, prefix: str = TEXT, fused: bool = True) -> list[Piece]:
    """Every tensor of the text model, layer by layer. fused: all experts of a layer in one tensor (as published), else one each."""
    found: list[Piece] = []
    for path, spec in flat(transformer.specs(cfg)).items():
        whole = tuple((0, n) for n in spec.shape)
        if path[0] != "blocks":
            name = "lm_head.weight" if path[0] == "lm_head" else f"{prefix}{path[0]}.weight"
            layer = -1 if path[0] == "embed_tokens" else cfg.num_layers
            found.append(Piece(name, spec.shape, path, whole, tuple(range(len(spec.shape))), layer))
            continue
        for n in range(cfg.num_blocks):
            layer = n * cfg.block_layers + int(path[1])
            base = ".".join((f"{prefix}layers.{layer}", *path[2:]))
            box = ((n, n + 1), *whole[1:])
            if "experts" in path:
                found += _experts(base, path, box, layer, fused)
            else:
                found.append(_plain(base, path, box, layer))
    return sorted(found, key=lambda piece: piece.layer)


def _plain(base: str, path: PathKeys, box: Box, layer: int) -> Piece:
    name = base if path[-1] in ("A_log", "dt_bias") else f"{base}.weight"
    axes = tuple(range(len(box) - 1, 0, -1))  # a vector stays, a matrix (in, out) is [out, in] there
    shape = tuple(box[i][1] for i in axes)
    return Piece(name, (shape[0], 1, shape[1]) if path[-1] == "conv1d" else shape, path, box, axes, layer)


def _experts(base: str, path: PathKeys, box: Box, layer: int, fused: bool) -> list[Piece]:
    block, (_, experts), (_, rows), (_, columns) = box
    if fused:
        return [Piece(base, (experts, columns, rows), path, box, (1, 3, 2), layer)]
    halves = (
        {"down_proj": (0, columns)} if path[-1] == "down_proj" else {"gate_proj": (0, columns // 2), "up_proj": (columns // 2, columns)}
    )
    above = base.rpartition(".")[0]
    return [
        Piece(f"{above}.{e}.{name}.weight", (end - begin, rows), path, (block, (e, e + 1), (0, rows), (begin, end)), (3, 2), layer)
        for e in range(experts)
        for name, (begin, end) in halves.items()
    ]


def layout(names: Iterable[str]) -> tuple[str, bool]:
    """(prefix of the text model, are experts fused) of a checkpoint with these names."""
    names = list(names)
    prefix = MULTIMODAL if any(name.startswith(MULTIMODAL) for name in names) else TEXT
    single = re.compile(re.escape(prefix) + r"layers\.\d+\.mlp\.experts\.\d+\.")
    return prefix, not any(single.match(name) for name in names)


def grouped(names: Iterable[str]) -> list[str]:
    """The names in few lines that lose none: those that differ in numbers only are one line, with the numbers' ranges and a count."""
    alike: dict[str, list[tuple[int, ...]]] = collections.defaultdict(list)
    for name in names:
        alike[re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)].append(tuple(int(number) for number in re.findall(r"(?<=\.)(\d+)(?=\.)", name)))
    lines = []
    for form, found in alike.items():
        if not form.count("{}"):
            lines.append(form)
            continue
        ranges = [sorted(set(column)) for column in zip(*found, strict=True)]
        if math.prod(map(len, ranges)) == len(found) and all(column[-1] - column[0] == len(column) - 1 for column in ranges):
            shown = (str(column[0]) if len(column) == 1 else f"{{{column[0]}-{column[-1]}}}" for column in ranges)
            lines.append(form.format(*shown) + (f" ({len(found)})" if len(found) > 1 else ""))
        else:
            lines += [form.format(*numbers) for numbers in found]
    return lines
