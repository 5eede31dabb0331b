"""Writes examples of every message of a release, with the release's own generated code.

    python examples.py GEN_FOLDER OUT_FOLDER

Runs by itself, beside no other module of the tests: it has to work with the code of any release. Each message gets one
example with all its fields filled and one more for each further member of a oneof. A file per package holds, by
message, the bytes in hex and what they mean as JSON. The same code always writes the same files.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

DEEPEST = 6
NUMBER = 1000


def main(gen: Path, out: Path) -> None:
    """Write the files."""
    sys.path.insert(0, str(gen))
    packages: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(gen.rglob("soma/**/*_pb2.py")):
        module = importlib.import_module(".".join(path.relative_to(gen).with_suffix("").parts))
        for name, descriptor in sorted(module.DESCRIPTOR.message_types_by_name.items()):
            packages.setdefault(module.DESCRIPTOR.package, {})[name] = list(_examples(descriptor))
    out.mkdir(parents=True, exist_ok=True)
    for package, messages in packages.items():
        text = json.dumps(messages, indent=1, sort_keys=True)
        (out / f"{package}.json").write_text(text + "\n", encoding="utf-8")


def _examples(descriptor: Descriptor) -> Iterator[dict[str, Any]]:
    members = max((len(oneof.fields) for oneof in descriptor.oneofs), default=1)
    for choice in range(members):
        message = _filled(descriptor, choice, DEEPEST)
        yield {
            "hex": message.SerializeToString(deterministic=True).hex(),
            "means": MessageToDict(message, preserving_proto_field_name=True),
        }


def _filled(descriptor: Descriptor, choice: int, depth: int) -> Message:
    """A message with every field set; of each oneof the member at `choice`, or its last."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        oneof = field.containing_oneof
        if oneof is not None and field is not oneof.fields[min(choice, len(oneof.fields) - 1)]:
            continue
        if field.message_type is not None and depth == 0:
            continue
        _fill(message, field, choice, depth)
    return message


def _fill(message: Message, field: FieldDescriptor, choice: int, depth: int) -> None:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        key, value = kind.fields_by_name["key"], kind.fields_by_name["value"]
        entries = getattr(message, field.name)
        if value.message_type is not None:
            entries[_scalar(key)].CopyFrom(_filled(value.message_type, choice, depth - 1))
        else:
            entries[_scalar(key)] = _scalar(value)
    elif kind is not None:
        made = _filled(kind, choice, depth - 1)
        if field.is_repeated:
            getattr(message, field.name).append(made)
        else:
            getattr(message, field.name).CopyFrom(made)
    elif field.is_repeated:
        getattr(message, field.name).extend([_scalar(field), _scalar(field)])
    else:
        setattr(message, field.name, _scalar(field))


def _scalar(field: FieldDescriptor) -> Any:
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return hashlib.blake2b(field.full_name.encode(), digest_size=16).digest()
        case FieldDescriptor.CPPTYPE_STRING:
            return f"{field.name} ✓"
        case FieldDescriptor.CPPTYPE_BOOL:
            return True
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return field.number + 0.5
        case _:
            return NUMBER + field.number


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
