"""docs/reference/settings.md has every setting of every service, with default and docstring, and none beside."""

import ast
import inspect
import itertools
import textwrap
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from services.cognition.settings import CognitionSettings
from services.controlplane.settings import ControlplaneSettings
from services.gateway.settings import GatewaySettings
from services.router.settings import RouterSettings
from services.toolgw.settings import ToolgwSettings
from soma_common.settings import ENV_PREFIX, ServiceSettings

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "settings.md"
CLASSES: dict[str, type[ServiceSettings]] = {
    "Every service": ServiceSettings,
    "Gateway": GatewaySettings,
    "Router": RouterSettings,
    "Cognition": CognitionSettings,
    "Tool gateway": ToolgwSettings,
    "Control plane": ControlplaneSettings,
}


@pytest.mark.parametrize("heading", CLASSES)
def test_the_table_is_what_the_class_says(heading: str) -> None:
    assert _written(heading) == rows(CLASSES[heading])


def test_every_setting_is_explained() -> None:
    unexplained = [row for cls in CLASSES.values() for row in rows(cls) if row.endswith("|  |")]
    assert unexplained == []


def rows(cls: type[ServiceSettings]) -> list[str]:
    """Return the table's rows for the settings that `cls` itself names, in its order."""
    told = {**_docstrings(ServiceSettings), **_docstrings(cls)}
    fields = cls.model_fields
    return [
        f"| `{ENV_PREFIX}{name.upper()}` | {_default(fields[name])} | {told.get(name, '')} |"
        for name in cls.__annotations__
        if name in fields
    ]


def _docstrings(cls: type[ServiceSettings]) -> dict[str, str]:
    """Return the strings that stand below the fields in the class's source, each as one line."""
    (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(cls))).body if hasattr(node, "body"))
    told = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match below:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    told[field.target.id] = " ".join(text.split())
    return told


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default in (None, (), "") else f"`{field.default}`"


def _written(heading: str) -> list[str]:
    section = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith(f"| `{ENV_PREFIX}")]
