"""docs/reference/settings.md is what the settings classes say, and they say something of each setting."""

from tools import settings_reference


def test_the_page_is_what_the_classes_say() -> None:
    assert settings_reference.PAGE.read_text() == settings_reference.render(), (
        "run `python -m tools.settings_reference`"
    )


def test_every_setting_is_explained() -> None:
    rows = [row for cls in settings_reference.CLASSES.values() for row in settings_reference.rows(cls)]
    assert [row for row in rows if row.endswith("|  |")] == []
