"""The embedded domains by name. A new domain is one module and one line here."""

from .base import Call, Domain, Observation, Outcome, Task, judge, solve
from .engineering import Engineering
from .general import General
from .instruction_following import InstructionFollowing
from .long_context import LongContext
from .science import Science
from .search import Search
from .store import Store
from .tool_graph import ToolGraph

DOMAINS: dict[str, Domain] = {
    "search": Search(),
    "engineering": Engineering(),
    "science": Science(),
    "instruction_following": InstructionFollowing(),
    "tool_calling": ToolGraph(),
    "general": General(),
}
"""The family of tasks that a domain's name stands for where an experiment names no other."""

QUICKSTART: dict[str, Domain] = {"search": Search(), "tool_calling": Store()}
"""The two smallest families: what quickstart, cross_tokenizer and most tests learn."""

__all__ = [
    "DOMAINS",
    "QUICKSTART",
    "Call",
    "Domain",
    "LongContext",
    "Observation",
    "Outcome",
    "Search",
    "Store",
    "Task",
    "ToolGraph",
    "judge",
    "solve",
]
