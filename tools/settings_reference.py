"""Write docs/reference/settings.md from the settings classes: names, defaults, and the strings below the fields.

python -m tools.settings_reference      # write it; a contract test fails when it is not what the classes say
"""

import ast
import inspect
import itertools
import textwrap
from pathlib import Path
from typing import Final

from pydantic.fields import FieldInfo

from services.cognition.settings import CognitionSettings
from services.controlplane.settings import ControlplaneSettings
from services.gateway.settings import GatewaySettings
from services.router.settings import RouterSettings
from services.toolgw.settings import ToolgwSettings
from soma_common.settings import ENV_PREFIX, ServiceSettings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "settings.md"

CLASSES: Final[dict[str, type[ServiceSettings]]] = {
    "Every service": ServiceSettings,
    "Gateway": GatewaySettings,
    "Router": RouterSettings,
    "Cognition": CognitionSettings,
    "Tool gateway": ToolgwSettings,
    "Control plane": ControlplaneSettings,
}
"""By heading, in the order of the page."""

HEAD = """\
# Settings

Made from the settings classes by `python -m tools.settings_reference`; do not edit.

Services read their settings from the environment once, when they start. A bad value ends the process with exit code 2
and a list of what to change. Units are part of the names: `_S` seconds, `_MS` milliseconds, `_BYTES`. An empty default
means: not set.

The standalone stack sets the instance names, the addresses, the database, the keys, tokens and log files, and the two
limits of the shutdown by itself. Any other variable that is set where `somastack up` starts reaches every service:

```console
$ SOMA_LOG_LEVEL=debug SOMA_ACK_WAIT_S=60 somastack up
```

What a service names again below the settings of every service, it cannot run without, or has its own default for.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(render())


def render() -> str:
    """Return the page for the classes as they are in the working tree."""
    return HEAD + "".join(
        f"\n## {heading}\n\n| variable | default | |\n|---|---|---|\n" + "".join(f"{row}\n" for row in rows(cls))
        for heading, cls in CLASSES.items()
    )


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
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    told = {}
    for field, below in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match below:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    told[field.target.id] = " ".join(text.split())
    return told


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default in (None, (), "") else f"`{field.default}`"


if __name__ == "__main__":
    main()
