"""TPU chips by name: sizes and peaks, the topologies that can be compiled for, and an estimate of time from them.

Per chip, as the vendor's public system-architecture pages give them (dense bfloat16; ICI one way): v4 275 TFLOP/s, 32 GiB, 1228 GB/s,
6 links of 50 GB/s; v5e 197, 16, 819, 4 x 50; v5p 459, 95, 2765, 6 x 100; v6e 918, 32, 1640, 4 x 100; tpu7x 2307, 192, 7380, 6 x 100. A
device of jax is a whole chip on v5e, v5p (its two cores as one) and v6e; on v4 and tpu7x the compiler's topologies describe each of the
two cores as a device with half of everything. Every number in the table is per device; hbm is what the compiler (libtpu 0.0.52) leaves to a
program, read off its refusals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from ..config import ConfigError

GIB = 1 << 30
EXAMPLES = "v5p:4x4x8 (128 chips), v6e:16x16 (256), v5e:2x4 (8), tpu7x:4x4x4 (64 chips of two devices)"
MATRIX = 0.6  # share of peak that large matrix products reach
ASSUMPTION = (
    "an estimate, not a measurement: the longest of three times, as if they overlapped perfectly: matrix products by formula (recomputed "
    f"ones and 6 passes for float32 ones included) at {MATRIX:.0%} of peak, bytes through HBM at full speed, and bytes between chips one "
    "collective after another, each over the two links of one dimension of the torus"
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device has. flops: bfloat16 per second; hbm: bytes; hbm_speed: bytes per second; ici_speed: bytes per second one way over
    both links of one dimension; cores: devices per chip."""

    name: str
    flops: float
    hbm: int
    hbm_speed: float
    ici_speed: float
    cores: int = 1


# By jax's device_kind.
CHIPS = {
    "TPU v4": Chip("v4", 137.5e12, int(15.25 * GIB), 614e9, 50e9, 2),
    "TPU v5 lite": Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 100e9),
    "TPU v5": Chip("v5p", 459e12, int(95.73 * GIB), 2765e9, 200e9),
    "TPU v6 lite": Chip("v6e", 918e12, int(31.24 * GIB), 1640e9, 200e9),
    "TPU7x": Chip("tpu7x", 1153.5e12, int(94.74 * GIB), 3690e9, 100e9, 2),
}
FAMILIES = ("v4", "v5e", "v5p", "v6e", "tpu7x")


def prepare_environment() -> None:
    """To be called before jax is imported: no accelerator is looked for, nothing is asked of a metadata server, other compilers may run."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3"}


def devices(topology: str) -> tuple[list[Any], Chip]:
    """The devices of a topology such as "v5p:4x4x8", which need not be here, and what one of them has.

    Raises ConfigError for a name that the compiler does not know, and where the compiler (libtpu) is not installed."""
    from jax.experimental import topologies

    family, colon, shape = topology.partition(":")
    if family not in FAMILIES or not colon or not all(n.isdigit() for n in shape.split("x")):
        raise ConfigError(f"--topology {topology}: unknown; name a chip ({', '.join(FAMILIES)}) and its shape, e.g. {EXAMPLES}")
    try:
        with _quiet():
            found = list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:
        text = " ".join(str(error).split())
        if not _installed():
            raise ConfigError("the TPU compiler is not installed: pip install libtpu (no TPU is needed)") from None
        raise ConfigError(f"--topology {topology}: {text[:160]}; e.g. {EXAMPLES}") from None
    return found, CHIPS[found[0].device_kind]


def _installed() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """libtpu writes lines about hosts it does not find to the process's stderr; they mean nothing here and are dropped."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def estimate(chip: Chip, count: int, tokens: int, passes: float, moved: float, sent: float) -> dict[str, Any]:
    """Seconds and tokens per second of one call on ``count`` devices, see ASSUMPTION.

    passes: operations per token as bfloat16 passes; moved, sent: bytes per device through HBM and to other chips."""
    parts = {
        "compute": tokens * passes / (count * chip.flops * MATRIX),
        "hbm": moved / chip.hbm_speed,
        "ici": sent / chip.ici_speed,
    }
    bound = max(parts, key=parts.get)
    rate = tokens / parts[bound] if parts[bound] else 0.0
    return {
        **{f"{name}_seconds": value for name, value in parts.items()},
        "step_seconds": parts[bound],
        "bound_by": bound,
        "tokens_per_second": rate,
        "tokens_per_second_per_chip": rate * chip.cores / count,
        "assumption": ASSUMPTION,
    }
