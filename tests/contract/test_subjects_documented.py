"""docs/subjects.md names every subject that the code can build, and none beside."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

from soma_common.layout import LaneLayout
from soma_common.nats import lanes, subjects

PAGE = Path(__file__).parents[2] / "docs" / "subjects.md"
NOT_BUILDERS = {"tenant_of"}


def test_every_subject_is_documented() -> None:
    assert _documented() == {_pattern(build) for build in _builders()}


def test_the_stream_is_documented() -> None:
    number = 7
    assert lanes.stream_name(number).replace(str(number), "<lane>") in PAGE.read_text()


def test_the_stream_takes_the_inbound_subjects_of_its_lane() -> None:
    layout = LaneLayout(partitions=8, lanes=2)
    assert lanes.lane_config(1, layout, tenant_bound=10).subjects == [subjects.inbound("*", 1)]


def _builders() -> list[Callable[..., str]]:
    functions = inspect.getmembers(subjects, inspect.isfunction)
    return [
        function
        for name, function in functions
        if function.__module__ == subjects.__name__ and not name.startswith("_") and name not in NOT_BUILDERS
    ]


def _pattern(build: Callable[..., str]) -> str:
    """Return the subject with each argument replaced by its name, such as `soma.<tenant>.in.<lane>`."""
    names = inspect.signature(build).parameters
    return build(**{name: _Placeholder(f"<{name}>") for name in names})


class _Placeholder(str):
    """Stands for a name, a number or an id: ids are written in hex."""

    __slots__ = ()

    def hex(self) -> str:
        return self


def _documented() -> set[str]:
    """Return the subjects of the tables that describe them; the table of permissions uses wildcards."""
    return set(re.findall(r"`(soma\.(?:<tenant>|_)\.[^`*]+)`", PAGE.read_text()))
