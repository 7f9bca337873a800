"""Sizes of the TPU kernel's tiles, with their arithmetic. Nothing here changes a result, only time and memory.

Memory in VMEM at R rows per block, TM tokens, DK width, L bins of DEPTH (the pipeline keeps two of every input and output):

    hidden      2 * TM * DK * 2 bytes            logits      TM * R * 4
    matrix      2 * R * DK * 2                   candidates  2 * TM * L * DEPTH * 8
    sums        2 * 7 * TM * 128 * 4             carry       TM * 128 * 4

    R = 2048, DK = 2048, L = 512, DEPTH = 4: TM = 512 takes 4 + 16 + 4 + 16 + 3.5 + 0.25 = 44 MiB, TM = 1024 takes 72 MiB.

TM against bandwidth: a tile of the matrix is read once per TM tokens and used for 2 * TM operations per element of 2 bytes, so
reading hides behind multiplying from TM = peak / bandwidth on: 240 (v5e: 197e12 / 819e9), 166 (v5p: 459e12 / 2765e9),
560 (v6e: 918e12 / 1640e9), 312 (v7x: 2307e12 / 7400e9).

L and DEPTH: the k best fall into L bins like balls; a row is doubtful when one bin gets more than DEPTH of them, with
probability about L * (k / L)^(DEPTH + 1) / (DEPTH + 1)!, and is then computed again. More depth costs five vector operations per unit and
level, more bins a longer sort outside, which a TPU does for every top-k: at k = 128, 512 x 4 loses 0.4 % of the rows and sorts 2,048,
2048 x 3 loses 0.1 % and sorts 6,144, 128 x 8 loses 0.03 %, sorts 1,024 and inserts for twice as long.
"""

from __future__ import annotations

import dataclasses
import math

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tiles:
    """tokens: TM, a multiple of rows. width: DK, divides D. bins: L, a multiple of R / 16 that divides R or is a multiple of it;
    depth: values kept per bin. rows, lanes: what is handled at once in
    registers, lanes a multiple of R / 16. vmem_limit: bytes the compiler may use."""

    tokens: int
    width: int
    bins: int
    depth: int
    rows: int = 32
    lanes: int = 128
    vmem_limit: int = 48 * MIB


# By the start of a device's name, as jax prints it. VMEM of a core: 128 MiB on v5e and v6e, 64 MiB on v5p and v7x.
TOKENS = {"TPU v5 lite": 512, "TPU v5e": 512, "TPU v5p": 512, "TPU v5": 512, "TPU v6": 1024, "TPU7x": 512, "TPU v7": 512}
VMEM_LIMIT = {"TPU v5 lite": 100 * MIB, "TPU v5e": 100 * MIB, "TPU v6": 100 * MIB}  # others: 56 MiB
BINS = 512
DOUBTFUL = 0.005  # share of rows that may have to be computed again, by calculation


def doubtful(k: int, bins: int, depth: int) -> float:
    """About the share of rows in which some bin gets more than ``depth`` of the k best, if these fall like balls."""
    return min(1.0, math.comb(k, depth + 1) / float(bins) ** depth)


def depth_for(k: int, bins: int) -> int:
    """The least depth that keeps the share of doubtful rows within DOUBTFUL and has more than k candidates."""
    depth = -(-(k + 1) // bins)
    while doubtful(k, bins, depth) > DOUBTFUL:
        depth += 1
    return depth


def width_for(width: int, most: int = 2048) -> int:
    """The widest multiple of 128 that divides the width and is at most ``most``; the whole width where there is none."""
    return max((w for w in range(128, most + 1, 128) if width % w == 0), default=width)


def tiles_for(device_kind: str, block: int, width: int, k: int) -> Tiles:
    """The sizes for a device by its name, blocks of R rows, hidden width D and k. Unknown devices get those of the smallest."""
    if device_kind == "gpu":  # 32 tokens and as much of the width as keeps three stages in shared memory; not measured
        power = next(w for w in (64, 32, 16, 8, 4, 2, 1) if width % w == 0)
        return Tiles(32, power, BINS, depth_for(k, BINS))
    name = max((name for name in TOKENS if device_kind.startswith(name)), key=len, default="")
    bins = min(BINS, block) if BINS % (block // 16) == 0 else block
    limit = next((size for start, size in VMEM_LIMIT.items() if device_kind.startswith(start)), 56 * MIB)
    return Tiles(TOKENS.get(name, 256), width_for(width), bins, depth_for(k, bins), vmem_limit=limit)
