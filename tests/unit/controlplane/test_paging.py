from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soma_common.errors import InvalidRequest
from soma_common.paging import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, Page

LIST = ("agents", "tenants/demo")


@given(st.text(max_size=70), st.integers(0, 2000))
def test_a_token_leads_back_to_its_place(last: str, size: int) -> None:
    token = Page.asked(LIST, size, "").next_token(last)
    assert Page.asked(LIST, size, token).after == last
    assert len(token) < 512


def test_sizes_have_a_default_and_a_bound() -> None:
    assert Page.asked(LIST, 0, "").size == DEFAULT_PAGE_SIZE
    assert Page.asked(LIST, 5000, "").size == MAX_PAGE_SIZE


@pytest.mark.parametrize("other", [("agents", "tenants/acme"), ("tenants",), ("agents", "tenants/demo", "")])
def test_a_token_belongs_to_its_list(other: tuple[str, ...]) -> None:
    token = Page.asked(LIST, 0, "").next_token("a")
    with pytest.raises(InvalidRequest):
        Page.asked(other, 0, token)


@given(st.data())
def test_a_damaged_token_is_refused(data: st.DataObject) -> None:
    token = Page.asked(LIST, 0, "").next_token("assistant")
    position = data.draw(st.integers(0, len(token) - 1))
    letter = data.draw(st.sampled_from(string.ascii_letters + string.digits + "-_ =\N{BULLET}"))
    damaged = token[:position] + letter + token[position + 1 :]
    try:
        page = Page.asked(LIST, 0, damaged)
    except InvalidRequest:
        return
    assert page.after == "assistant"  # The last letter of base64 holds bits that mean nothing.


@given(st.text(max_size=60).filter(bool))
def test_a_token_of_nobody_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequest):
        Page.asked(LIST, 0, token)
