"""What the database refuses for its own reasons is tried again; only what it refuses for what is in a group is set
aside.
"""

import pytest

from services.router.application.group import GroupRejected, StoreLost
from tests.integration.router.store import Store
from tests.unit.router.builders import inbound, ingest

_REFUSE = """
CREATE FUNCTION router.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'refused' USING ERRCODE = '{code}';
END $$;
CREATE TRIGGER refuse BEFORE INSERT ON router.messages FOR EACH ROW EXECUTE FUNCTION router.refuse();
"""
OWN_TROUBLE = {
    "53100": "the disk is full",
    "53200": "out of memory",
    "58030": "the disk cannot be read",
    "XX000": "a quota or a limit of file sizes is reached",
    "XX001": "a page is damaged",
}
WRONG_CONTENT = {"22021": "not of the encoding", "23514": "a check", "54000": "too large for an index"}


@pytest.mark.parametrize("code", OWN_TROUBLE, ids=OWN_TROUBLE.values())
async def test_trouble_of_the_database_is_no_fault_of_a_message(store: Store, code: str) -> None:
    p = await store.take(0)
    await store.eye.execute(_REFUSE.format(code=code))
    with pytest.raises(StoreLost):
        await store.commit(ingest(p, 1, inbound()))
    await store.eye.execute("DROP TRIGGER refuse ON router.messages")
    assert (await store.commit(ingest(p, 1, inbound()))).inserted == {(0, 1)}


@pytest.mark.parametrize("code", WRONG_CONTENT, ids=WRONG_CONTENT.values())
async def test_what_is_refused_for_its_content_is_told_apart(store: Store, code: str) -> None:
    p = await store.take(0)
    await store.eye.execute(_REFUSE.format(code=code))
    with pytest.raises(GroupRejected):
        await store.commit(ingest(p, 1, inbound()))
