"""How resources are shown: tables for people, JSON for programs.

The JSON is the contract's own (names and forms as `buf curl` prints them), with the fields that have their default too.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.text import Text

NOTHING = "-"
TEXT_WIDTH = 60


def as_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[Text]:
    """Lines with a heading, as wide as they are: never wrapped, so that names can be copied."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for number, row in enumerate([headings, *rows]):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield Text("  ".join(cells).rstrip(), style="dim" if number == 0 else "")


def as_block(pairs: Sequence[tuple[str, str]]) -> Iterator[Text]:
    """One resource, a line for each of its values that is there."""
    width = max(len(key) for key, _ in pairs)
    for key, value in pairs:
        if value not in ("", NOTHING):
            yield Text.assemble((f"{key.ljust(width)}  ", "dim"), value)


def print_json(content: Message | Mapping[str, Message | Sequence[Message]]) -> None:
    """A message, or messages and lists of them by name, on the standard output."""
    shown = (
        _as_dict(content)
        if isinstance(content, Message)
        else {
            name: _as_dict(found) if isinstance(found, Message) else [_as_dict(each) for each in found]
            for name, found in content.items()
        }
    )
    sys.stdout.write(json.dumps(shown, indent=2, ensure_ascii=False) + "\n")


def print_json_line(message: Message) -> None:
    """A message of a stream, on a line of its own that is there at once."""
    sys.stdout.write(json.dumps(MessageToDict(message), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def lasting(milliseconds: float) -> str:
    """A duration in the unit that says most, rounded down; of a few seconds also their tenths."""
    seconds = max(0, int(milliseconds // 1000))
    if seconds < 10:
        return f"{max(0, int(milliseconds // 100)) / 10} s"
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def since(moment: Timestamp) -> str:
    """How long ago that was, by this machine's clock."""
    return lasting(time.time() * 1000 - moment.ToMilliseconds()) if moment.ToNanoseconds() else NOTHING


def between(begin: Timestamp, end: Timestamp) -> str:
    """How long it took; until now if it has no end."""
    return lasting(end.ToMilliseconds() - begin.ToMilliseconds()) if end.ToNanoseconds() else since(begin)


def at(moment: Timestamp) -> str:
    """The moment in UTC, to the second."""
    return datetime.fromtimestamp(moment.seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if moment.seconds else NOTHING


def one_line(text: str) -> str:
    """The beginning of a text for a table's cell."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= TEXT_WIDTH else flat[: TEXT_WIDTH - 1] + "…"


def printable(text: str) -> str:
    """A text without what would act on the terminal: what people and models write is shown, not obeyed."""
    return "".join(each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in text)


def _as_dict(message: Message) -> dict[str, object]:
    return MessageToDict(message, always_print_fields_with_no_presence=True)
