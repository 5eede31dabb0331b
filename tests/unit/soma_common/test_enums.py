"""Enums whose values are kept say the same as before, all of them."""

from soma.common.v1 import message_pb2, turn_pb2
from soma.router.v1 import inbound_pb2

from soma_common.enums import keep_enum_values


def test_values_are_kept_and_are_the_descriptors() -> None:
    for module, name in ((message_pb2, "Role"), (turn_pb2, "Outcome"), (inbound_pb2, "InboundKind")):
        enum = getattr(module, name)
        for value in enum.values():
            vars(enum).pop(enum.Name(value), None)
        keep_enum_values()
        described = {value.name: value.number for value in module.DESCRIPTOR.enum_types_by_name[name].values}
        assert {key: vars(enum)[key] for key in described} == described
        assert enum.Name(1) in described
        assert dict(enum.items()) == described
