"""TPU chips by name: peaks, sizes, and the topologies that can be compiled for.

Peaks are those of the vendor's public system-architecture pages, per chip, dense bfloat16: v4 275 TFLOP/s, 32 GiB, 1228 GB/s, 6 links of
50 GB/s; v5e 197, 16, 819, 4 x 50; v5p 459, 95, 2765, 6 x 100; v6e 918, 32, 1640, 4 x 100; tpu7x 2307, 192, 7380, 6 x 100 (bytes both ways
together are twice that). A device of jax is a whole chip on v5e, v5p (two cores as one) and v6e, and one of its two cores on v4 and
tpu7x, as the compiler's topologies describe them; every number below is per device.
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


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device has. flops: bfloat16 per second; hbm: bytes; hbm_speed and ici_speed: bytes per second, ici_speed one way over all
    of its links together."""

    name: str
    flops: float
    hbm: int
    hbm_speed: float
    ici_speed: float


# By jax's device_kind.
CHIPS = {
    "TPU v4": Chip("v4 core", 137.5e12, 16 * GIB, 614e9, 150e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9),
    "TPU v5": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 1640e9, 400e9),
    "TPU7x": Chip("tpu7x core", 1153.5e12, 96 * GIB, 3690e9, 300e9),
}
FAMILIES = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


def prepare_environment() -> None:
    """To be called before jax is imported: no accelerator is looked for, nothing is asked of a metadata server, other compilers may run."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3"}


def devices(topology: str) -> tuple[list[Any], Chip]:
    """The devices of a topology such as "v5p:4x4x8", which need not be here, and what one of them has.

    Raises ConfigError for a name that the compiler does not know, and where the compiler (libtpu) is not installed."""
    from jax.experimental import topologies

    family = topology.partition(":")[0]
    if family not in FAMILIES or ":" not in topology:
        raise ConfigError(f"--topology {topology}: unknown; name a chip ({', '.join(FAMILIES)}) and its shape, e.g. {EXAMPLES}")
    try:
        with _quiet():
            found = list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:
        text = " ".join(str(error).split())
        if "libtpu" in text or "PJRT" in text or "plugin" in text:
            raise ConfigError(f"--topology {topology}: the TPU compiler is not here ({text[:120]}); pip install libtpu") from None
        raise ConfigError(f"--topology {topology}: {text[:160]}; e.g. {EXAMPLES}") from None
    return found, CHIPS[found[0].device_kind]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """libtpu writes harmless lines about missing hosts to the process's stderr; they are shown only where it ends the process."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
