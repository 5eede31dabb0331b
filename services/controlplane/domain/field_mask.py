"""Partial updates (AIP-134): which fields of a patch go into the stored resource.

A path names a field or a field inside a singular message (`spec.instructions`). Without a mask every field that the
patch sets is meant, down to the single fields of nested messages; `*` means every writable field, set or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from services.controlplane.domain.refusals import invalid_field

M = TypeVar("M", bound=Message)

EVERYTHING = "*"


def merged(
    stored: M, patch: M, mask: FieldMask | None, writable: Iterable[str], by_verb: Mapping[str, str] | None = None
) -> M:
    """A copy of `stored` with the fields of `patch` that `mask` names. A field named and not set is cleared.

    `writable` are the top-level fields a caller may change; `mask` None or empty means what the patch sets. `by_verb`
    are flags that other methods change, with their names: a patch that would set one is refused and told which, as it
    would otherwise seem to have done it. One that says what is so anyway, as after a read, is not.

    Raises:
        InvalidRequest: the mask names a field that does not exist or is not the caller's to change; the patch sets a
            flag that another method sets.
    """
    allowed, verbs = list(writable), by_verb or {}
    if mask is None or not mask.paths:
        _refuse_flags(stored, patch, verbs)
        paths = [path for path in _set_paths(patch) if path.split(".", 1)[0] in allowed]
    elif list(mask.paths) == [EVERYTHING]:
        _refuse_flags(stored, patch, verbs)
        paths = allowed
    else:
        paths = list(mask.paths)
    result = type(stored)()
    result.CopyFrom(stored)
    for path in paths:
        _check(stored, path, allowed, verbs)
        _copy(patch, result, path)
    return result


def _set_paths(message: Message, prefix: str = "") -> Iterator[str]:
    """Paths of all fields that are set, nested singular messages taken apart."""
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        if _is_nested(field):
            yield from _set_paths(value, f"{path}.")
        else:
            yield path


def _refuse_flags(stored: Message, patch: Message, verbs: Mapping[str, str]) -> None:
    for flag, methods in verbs.items():
        if getattr(patch, flag) and not getattr(stored, flag):
            raise invalid_field(flag, f"is changed by {methods} alone")


def _check(message: Message, path: str, allowed: list[str], verbs: Mapping[str, str]) -> None:
    """Refuse a path that leads nowhere or to a field the server alone writes."""
    head = path.split(".", 1)[0]
    if head in verbs:
        raise invalid_field("update_mask", f"{path!r} is changed by {verbs[head]} alone")
    if head not in allowed:
        raise invalid_field("update_mask", f"{path!r} cannot be changed; fields that can: {', '.join(allowed)}, or *")
    *parents, leaf = path.split(".")
    for parent in parents:
        field = message.DESCRIPTOR.fields_by_name.get(parent)
        if field is None or not _is_nested(field):
            raise invalid_field("update_mask", f"{path!r}: {parent!r} has no fields inside")
        message = getattr(message, parent)
    if leaf not in message.DESCRIPTOR.fields_by_name:
        raise invalid_field("update_mask", f"{path!r}: {message.DESCRIPTOR.name} has no field {leaf!r}")


def _copy(source: Message, target: Message, path: str) -> None:
    """Replace one field of `target` by that of `source`."""
    *parents, leaf = path.split(".")
    for parent in parents:
        source, target = getattr(source, parent), getattr(target, parent)
    field = source.DESCRIPTOR.fields_by_name[leaf]
    target.ClearField(leaf)
    if field.is_repeated:
        getattr(target, leaf).MergeFrom(getattr(source, leaf))
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        if source.HasField(leaf):
            getattr(target, leaf).CopyFrom(getattr(source, leaf))
    elif not field.has_presence or source.HasField(leaf):
        setattr(target, leaf, getattr(source, leaf))


def _is_nested(field: Any) -> bool:
    """Whether a field (protobuf's types have two names for its descriptor) holds one message."""
    return bool(field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated)
