"""Write docs/reference/api.md from the contracts: their comments, validation rules and authorization options.

python -m tools.api_reference           # write it
python -m tools.api_reference --check   # fail when it is not what proto/ says (a contract test calls this)
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from buf.validate import validate_pb2
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from soma.common.v1 import authz_pb2

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "api.md"
BUF = Path(sys.executable).parent / "buf"

# The order in which a reader meets them: from the edge inwards, what all share last.
PACKAGES: Final = ("gateway", "router", "cognition", "toolgw", "controlplane", "common")

# Numbers of the parts of a path into a file (google/protobuf/descriptor.proto).
MESSAGES, ENUMS, SERVICES = 4, 5, 6
FIELDS, NESTED = 2, 3
METHODS, VALUES = 2, 2

Place = tuple[int, ...]

HEAD = """\
# API reference

Made from `proto/` by `python -m tools.api_reference`; do not edit. Errors are listed in [errors](../errors.md); a
permission is what the caller's token must grant, for the tenant that the named field holds.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or compare it; return 1 when the comparison fails."""
    text = render()
    if "--check" in (sys.argv[1:] if arguments is None else arguments):
        if PAGE.exists() and PAGE.read_text() == text:
            return 0
        print(f"{PAGE.relative_to(ROOT)} is not what proto/ says: run `python -m tools.api_reference`")
        return 1
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text)
    return 0


def render() -> str:
    """Return the page for the contracts as they are in the working tree."""
    command = (str(BUF), "build", "--as-file-descriptor-set", "-o", "-")
    image = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    files = [Contract.of(file) for file in FileDescriptorSet.FromString(image).file if file.package.startswith("soma.")]
    files.sort(key=lambda contract: (PACKAGES.index(contract.file.package.split(".")[1]), contract.file.name))
    return "\n".join([HEAD, *_contents(files), *(line for contract in files for line in contract.lines())]) + "\n"


@dataclass(frozen=True, slots=True)
class Contract:
    """One proto file and the comments of its elements, by their place in it."""

    file: FileDescriptorProto
    comments: Mapping[Place, str]

    @classmethod
    def of(cls, file: FileDescriptorProto) -> "Contract":
        """Read the comments of a file."""
        locations = file.source_code_info.location
        return cls(file, {tuple(at.path): at.leading_comments.strip() for at in locations if at.leading_comments})

    def lines(self) -> Iterator[str]:
        """Yield the file's part of the page."""
        yield f"\n## {_title(self.file)}\n"
        for number, service in enumerate(self.file.service):
            yield from self._service(service, (SERVICES, number))
        for number, message in enumerate(self.file.message_type):
            yield from self._message(message, (MESSAGES, number), message.name)
        for number, enum in enumerate(self.file.enum_type):
            yield from self._enum(enum, (ENUMS, number))

    def _service(self, service: ServiceDescriptorProto, place: Place) -> Iterator[str]:
        yield f"### {service.name}\n\n{self._comment(place)}\n"
        for number, method in enumerate(service.method):
            yield from self._method(method, (*place, METHODS, number))

    def _method(self, method: MethodDescriptorProto, place: Place) -> Iterator[str]:
        request = ("stream " if method.client_streaming else "") + _link(method.input_type)
        response = ("stream " if method.server_streaming else "") + _link(method.output_type)
        yield f"#### {method.name}\n\n{request} → {response}\n\n{_permission(method)}\n\n{self._comment(place)}\n"

    def _message(self, message: DescriptorProto, place: Place, name: str) -> Iterator[str]:
        yield f'### <a id="{_anchor(self.file.package, name)}"></a>{name}\n\n{self._comment(place)}\n'
        if message.field:
            yield "| field | type | rules | |\n|---|---|---|---|"
            entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
            for number, field in enumerate(message.field):
                yield self._field(message, field, (*place, FIELDS, number), entries)
            yield ""
        for number, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                yield from self._message(nested, (*place, NESTED, number), f"{name}.{nested.name}")

    def _field(
        self,
        message: DescriptorProto,
        field: FieldDescriptorProto,
        place: Place,
        entries: Mapping[str, DescriptorProto],
    ) -> str:
        choice = ""
        if field.HasField("oneof_index") and not field.proto3_optional:
            choice = f"one of `{message.oneof_decl[field.oneof_index].name}`"
        rules = "; ".join(filter(None, [choice, "optional" if field.proto3_optional else "", *_rules(field)]))
        return f"| `{field.name}` | {_type(field, entries)} | {rules} | {_in_cell(self._comment(place))} |"

    def _enum(self, enum: EnumDescriptorProto, place: Place) -> Iterator[str]:
        yield f'### <a id="{_anchor(self.file.package, enum.name)}"></a>{enum.name}\n\n{self._comment(place)}\n'
        yield "| value | number | |\n|---|---|---|"
        for number, value in enumerate(enum.value):
            yield f"| `{value.name}` | {value.number} | {_in_cell(self._comment((*place, VALUES, number)))} |"
        yield ""

    def _comment(self, place: Place) -> str:
        paragraphs = self.comments.get(place, "").split("\n\n")
        return "\n\n".join(" ".join(line.strip() for line in paragraph.splitlines()) for paragraph in paragraphs)


def _contents(files: Sequence[Contract]) -> Iterator[str]:
    """Yield the list of services and methods at the top of the page."""
    for contract in files:
        for service in contract.file.service:
            methods = ", ".join(f"[{method.name}](#{method.name.lower()})" for method in service.method)
            yield f"- **{contract.file.package}.{service.name}**: {methods}"


def _title(file: FileDescriptorProto) -> str:
    return file.name.removeprefix("soma/")


def _permission(method: MethodDescriptorProto) -> str:
    rule = method.options.Extensions[authz_pb2.authz]
    if rule.public:
        return "Open to everybody."
    tenant = f"tenant from `{rule.tenant_field}`" if rule.tenant_field else "only for callers of all tenants"
    return f"Permission `{rule.permission}`, {tenant}."


def _rules(field: FieldDescriptorProto) -> Iterator[str]:
    """Yield a field's validation rules in the words of protovalidate."""
    if not field.options.HasExtension(validate_pb2.field):
        return
    rules = text_format.MessageToString(field.options.Extensions[validate_pb2.field], as_one_line=True)
    yield f"`{_in_cell(rules.strip())}`"


def _type(field: FieldDescriptorProto, entries: Mapping[str, DescriptorProto]) -> str:
    entry = entries.get(field.type_name.rsplit(".", 1)[-1])
    if entry is not None:
        key, value = entry.field
        return f"map of {_type(key, {})} to {_type(value, {})}"
    if field.type_name:
        name = _link(field.type_name)
    else:
        name = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    return f"list of {name}" if field.label == FieldDescriptorProto.LABEL_REPEATED else name


def _link(type_name: str) -> str:
    """Return a link to a type of ours, the bare name of another's."""
    package, name = type_name.lstrip(".").rsplit(".", 1)
    return f"[{name}](#{_anchor(package, name)})" if package.startswith("soma.") else f"`{package}.{name}`"


def _anchor(package: str, name: str) -> str:
    return f"{package}.{name}".replace(".", "-").lower()


def _in_cell(text: str) -> str:
    return text.replace("\n\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
