"""The tensorflow-datasets builder of tokenised runs (array_record files; no TensorFlow). Used by ``prepare``; imports are slow here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

FEATURES = {
    "domain": tfds.features.Text(doc="name of the run's domain, one of data.domain_names.DOMAINS"),
    "task_id": tfds.features.Text(doc="the task the run is of; several runs may share one"),
    "status": tfds.features.Text(doc="one of types.STATUSES, or empty when unknown"),
    "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32, doc="ids of the whole run"),
    "mask": tfds.features.Tensor(shape=(None,), dtype=np.uint8, doc="1 where the model wrote the token"),
    "reward": tfds.features.Scalar(dtype=np.float32, doc="verifier's reward; NaN when unknown"),
    "total": tfds.features.Scalar(dtype=np.int32, doc="number of tokens"),
    "supervised": tfds.features.Scalar(dtype=np.int32, doc="number of tokens with mask 1"),
}


class PreparedRuns(tfds.core.GeneratorBasedBuilder):
    """Tokenised agent runs, in the order of their sources."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}

    def __init__(self, *, rows: Callable[[], Iterable[dict[str, Any]]] | None = None, **options: Any):
        self._rows = rows  # set when building; reading needs none
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        # No shuffling: the loader shuffles by seed and epoch, and the order of the sources is worth keeping.
        return tfds.core.DatasetInfo(
            builder=self, description="Tokenised agent runs.", features=tfds.features.FeaturesDict(FEATURES), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterable[tuple[int, dict[str, Any]]]:
        yield from enumerate(self._rows())
