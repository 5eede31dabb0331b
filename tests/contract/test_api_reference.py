"""docs/reference/api.md is what the contracts say."""

from tools import api_reference


def test_the_page_is_what_the_contracts_say() -> None:
    assert api_reference.PAGE.read_text() == api_reference.render(), "run `python -m tools.api_reference`"


def test_every_element_says_something() -> None:
    assert "| |\n" not in api_reference.render().replace("| field | type | rules | |\n", "").replace(
        "| value | number | |\n", ""
    )
