"""From hidden states and an output matrix to the logits a loss looks at, never the logits of all tokens over all ids.

See ../README.md. ``reference`` is the dense form, ``ops`` the blocked one over ids; ``aligned`` adds ids up to units,
blocked or by the kernel, over the permuted matrix of ``layout``; ``targets`` does so for a whole batch of turns.
"""

from .aligned import Aligned, aligned_topk, aligned_topk_logits
from .layout import Arranged, Layout, arrange
from .members import Members, gather_units
from .ops import gather_logits, logsumexp, topk
from .targets import Positions, Tables, Targets, aligned_targets

__all__ = [
    "Aligned", "Arranged", "Layout", "Members", "Positions", "Tables", "Targets", "aligned_targets", "aligned_topk",
    "aligned_topk_logits", "arrange", "gather_logits", "gather_units", "logsumexp", "topk",
]  # fmt: skip
