"""ListTools: the tools of a tenant, page by page, sorted by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from services.toolgw.application.catalog import ToolCatalog
from services.toolgw.domain.tool import ToolDefinition
from soma_common.paging import Page


class ToolPage(NamedTuple):
    """A page of tools."""

    tools: Sequence[ToolDefinition]
    next_page_token: str
    """Empty: this is the last page."""


class ListTools:
    """Lists what `catalog` holds."""

    def __init__(self, catalog: ToolCatalog) -> None:
        self._catalog = catalog

    def __call__(self, tenant: str, page_size: int, page_token: str) -> ToolPage:
        """Return a page; `page_size` 0 means 50.

        Raises:
            InvalidRequest: PAGE_TOKEN_INVALID.
        """
        page = Page.asked(("tools", tenant), page_size, page_token)
        left = [tool for tool in self._catalog.definitions(tenant) if tool.name > page.after]
        shown = left[: page.size]
        token = page.next_token(shown[-1].name) if len(left) > page.size else ""
        return ToolPage(shown, token)
