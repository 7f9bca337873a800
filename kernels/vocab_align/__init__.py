"""From hidden states and an output matrix to the logits a loss looks at, never the logits of all tokens over all ids.

See ../README.md. ``reference`` is the dense form, ``ops`` the blocked one.
"""

from .ops import gather_logits, logsumexp, topk

__all__ = ["gather_logits", "logsumexp", "topk"]
