"""The six domains of the paper (arXiv 2606.30616, section 2.2) and which of them a foreign run belongs to.

``Example.domain`` and ``Batch.domains`` are indices into DOMAINS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from a1jax.data.errors import DataError

DOMAINS = ("search", "engineering", "science", "instruction_following", "tool_calling", "general")
DEFAULT = "general"

# Environment names of NeMo-Gym, matched as whole words of the name (split at "_"), first row that matches wins. What a run is *for*
# decides: long-context questions count as instruction following (the paper trains them there), mathematics and physics as science,
# playing a policy against a simulated user, games and desktop tasks as general.
_WORDS: dict[str, str] = {
    "engineering": "anyswe anyterminal bigcodebench code coding deepswe opencode pi spider2 sql swe swerl",
    "search": "browsecomp finance legal search",
    "tool_calling": "bfcl mcp multi openair session tool workplace",
    "science": "biomnibench equivalence ether0 imo math mcqa ns omniscience physics polymath prime proof reasoning scicode ugphysics",
    "instruction_following": (
        "aalcr calendar graphwalks ifbench ifeval instruction lc longmt multichallenge ragtruth ruler2 structeval verifif"
    ),
}


def of_environment(name: str) -> str:
    """Domain of an environment or file name; "general" when no word of it is known."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return next((domain for domain, known in _WORDS.items() if words & set(known.split())), DEFAULT)


def index(domain: str, domains: Sequence[str] = DOMAINS) -> int:
    """Index of a domain. Raises DataError for a name that is not in ``domains``."""
    try:
        return tuple(domains).index(domain)
    except ValueError:
        raise DataError(f"unknown domain {domain!r}: use one of {', '.join(domains)}") from None
