"""Endless batches of packed rows, shuffled, sharded over hosts, resumable.

The stream of rows is one sequence that depends on the data, the seed and nothing else: all rows in a random order, then all rows in
another one, for ever. Batch k is rows k*B .. k*B+B-1 of it, so every row comes once per epoch, none is skipped or repeated, and a batch
may hold the end of one epoch and the start of the next. A host builds only the rows that its devices hold: host h of n the h-th n-th of
each batch, or the places it is told; what the hosts build is the batch one host would have had. The position is the number of batches
handed out, so it is what was trained on, not where prefetching stands (NeMo-RL#3599 lost 736 prompts that way).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from a1jax.data.errors import DataError
from a1jax.data.packing import Example, PackingReport, cut, plan, to_batch
from a1jax.types import Batch


class Source(Protocol):
    """Random access to Examples. A source that knows its ``lengths`` ([n] ints) spares reading everything before the first batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Loader(Iterator[Batch]):
    """Iterator over batches with a position that can be saved and restored. Build it with :func:`loader`."""

    def __init__(self, dataset: grain.MapDataset, rows: int, batch_size: int, identity: dict[str, Any], report: PackingReport, options):
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._identity = identity
        self._taken = 0
        self.tokens = 0  # of the batch handed out last, over all hosts, without padding
        self.report = report  # what packing did
        self.rows_per_epoch = rows
        self.batch_size = batch_size  # rows of one batch over all hosts

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        batch, self.tokens = next(self._iterator)
        self._taken += 1
        return batch

    @property
    def epoch(self) -> float:
        """Epochs handed out so far, with fraction."""
        return self._taken * self.batch_size / self.rows_per_epoch

    def get_state(self) -> dict[str, Any]:
        """Position after the last batch handed out, as JSON values. Save it together with the parameters that saw this batch."""
        return {"batches": self._taken, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue after the batch where ``state`` was taken, on this or any other number of hosts.

        Raises DataError when the state was taken with other data, lengths, batch size or seed: positions would mean other rows.
        """
        other = sorted(key for key, value in self._identity.items() if state.get(key) != value)
        if other or not isinstance(state.get("batches"), int):
            what = ", ".join(f"{key} {state.get(key)!r} now {self._identity[key]!r}" for key in other) or "no position"
            raise DataError(f"this loader position is of another run ({what}): resume with the same data and settings")
        inner = self._iterator.get_state()
        self._iterator.set_state({**inner, "next_index": state["batches"]})
        self._taken = state["batches"]


def loader(
    source: Source | Sequence[Example],
    batch_size: int,
    max_length: int,
    seed: int,
    policy: str = "split",
    pad_id: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 1,
    prefetch: int = 4,
    places: Sequence[int] | None = None,
) -> Loader:
    """Batches [batch_size / shard_count, max_length] of this host, endlessly.

    batch_size: rows of a batch over all hosts. places: which of them this host builds (``sharding.rows_here``), in this order, where they
    are not its n-th: hosts may then share rows. policy: see ``packing.pack``. threads, prefetch: how many batches are made ahead; they
    change nothing but speed. Rows are packed once; an epoch shuffles rows, not what is in them.
    Raises DataError when the rows of the source do not fill one batch or the hosts cannot share a batch equally.
    """
    if batch_size < 1 or shard_count < 1 or batch_size % shard_count or not 0 <= shard_index < shard_count:
        raise DataError(f"a batch of {batch_size} rows cannot be shared by host {shard_index} of {shard_count}: use a multiple")
    lengths = getattr(source, "lengths", None)
    lengths = [len(source[i]) for i in range(len(source))] if lengths is None else [int(n) for n in lengths]
    rows, report = plan(lengths, max_length, policy)
    if len(rows) < batch_size:
        raise DataError(f"{len(lengths)} examples fill {len(rows)} rows of {max_length}, fewer than one batch of {batch_size}: add data")
    share = batch_size // shard_count
    mine = np.arange(shard_index * share, (shard_index + 1) * share) if places is None else np.asarray(places, np.int64)

    def fetch(indices: np.ndarray) -> tuple[Batch, int]:
        chosen = [[cut(source[i], start, stop) for i, start, stop in rows[row]] for row in indices[mine].tolist()]
        return to_batch(chosen, max_length, pad_id), sum(stop - start for row in indices.tolist() for _, start, stop in rows[row])

    # Endless in effect: grain's own endless repeat overflows a length when the batch is one row.
    epochs = (1 << 48) // len(rows)
    order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat(epochs, reseed_each_epoch=True)
    dataset = order.batch(batch_size).map(fetch)
    digest = hashlib.sha256(np.asarray(lengths, np.int64).tobytes() + policy.encode()).hexdigest()[:16]
    identity = {"data": digest, "max_length": max_length, "batch_size": batch_size, "seed": seed}
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return Loader(dataset, len(rows), batch_size, identity, report, options)
