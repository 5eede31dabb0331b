"""The tools of this installation, by name and by tenant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.toolgw.application.ports import Tool
from services.toolgw.domain.tool import ToolDefinition


class DuplicateTool(ValueError):
    """Two tools have one name."""


class ToolCatalog:
    """All tools, fixed from the start on."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            name = tool.definition.name
            if name in self._tools:
                raise DuplicateTool(f"two tools are named {name!r}: rename one")
            self._tools[name] = tool

    def find(self, tenant: str, name: str) -> Tool | None:
        """The tool `name` of `tenant`, to be called."""
        tool = self.compensation(tenant, name)
        return tool if tool is not None and tool.definition.is_offered else None

    def compensation(self, tenant: str, name: str) -> Tool | None:
        """The tool `name` of `tenant`, to undo a call of another: also one that nobody is offered."""
        tool = self._tools.get(name)
        return tool if tool is not None and tool.definition.serves(tenant) else None

    def definitions(self, tenant: str) -> Sequence[ToolDefinition]:
        """All tools of `tenant` that are offered, sorted by name."""
        tools = (self.find(tenant, name) for name in sorted(self._tools))
        return [tool.definition for tool in tools if tool is not None]
