"""The embedded domains by name. A new domain is one module and one line here."""

from .base import Call, Domain, Observation, Outcome, Task, judge, solve
from .search import Search
from .tool_calling import ToolCalling

DOMAINS: dict[str, Domain] = {"search": Search(), "tool_calling": ToolCalling()}

__all__ = ["DOMAINS", "Call", "Domain", "Observation", "Outcome", "Search", "Task", "ToolCalling", "judge", "solve"]
