"""The small store that all processes of a run share: the coordinator's, which jax keeps for itself and exports no name of.

The only place that asks jax's inner modules for it. Its calls fail when the coordinator is gone; who calls them expects that.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any


@dataclasses.dataclass(frozen=True)
class Store:
    """process: this one's number, of ``processes``. address: HOST:PORT of the coordinator, which is process 0."""

    client: Any
    process: int
    processes: int
    address: str

    def put(self, key: str, text: str) -> None:
        """Whatever stood there is replaced."""
        self.client.key_value_set(f"a1jax/{key}", text, allow_overwrite=True)

    def get(self, key: str, seconds: float) -> str:
        """Waits for it. Raises jax's error after so many seconds."""
        return self.client.blocking_key_value_get(f"a1jax/{key}", round(1000 * seconds))

    def entries(self, folder: str) -> dict[str, str]:
        """Last part of the key -> text, of all keys "folder/...". {} where there are none."""
        return {key.rpartition("/")[2]: text for key, text in self.client.key_value_dir_get(f"a1jax/{folder}/")}


def store() -> Store | None:
    """The store of this run's processes; None where there is one process, or where they have not joined yet."""
    if "jax" not in sys.modules:  # who has not imported it has not joined
        return None
    from jax._src import distributed

    joined = distributed.global_state
    if joined.client is None or joined.num_processes < 2:
        return None
    return Store(joined.client, joined.process_id, joined.num_processes, joined.coordinator_address)
