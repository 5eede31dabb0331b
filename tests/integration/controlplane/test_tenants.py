"""TenantService on real PostgreSQL over a real socket."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from soma.controlplane.v1.tenant_service_pb2 import (
    CreateTenantRequest,
    DeleteTenantRequest,
    GetTenantRequest,
    ListTenantsRequest,
    Tenant,
    UpdateTenantRequest,
)

from tests.integration.controlplane.conftest import Caller, Plane, refused


async def test_a_created_tenant_is_read_back(admin: Caller) -> None:
    request = CreateTenantRequest(tenant_id="demo", tenant=Tenant(display_name="Demo", weight=7, suspended=True))
    created = (await admin.tenants.CreateTenant(request)).tenant
    assert (created.name, created.display_name, created.weight, created.suspended) == ("tenants/demo", "Demo", 7, True)
    assert created.etag
    assert created.create_time == created.update_time
    assert (await admin.tenants.GetTenant(GetTenantRequest(name="tenants/demo"))).tenant == created


async def test_a_name_is_given_once(admin: Caller) -> None:
    await admin.tenant()
    async with refused("ALREADY_EXISTS"):
        await admin.tenant()


@pytest.mark.parametrize("name", ["demo", "tenants/", "tenants/Demo", "tenants/demo/agents/a", "tenants/-x"])
async def test_a_name_of_another_form_is_refused(admin: Caller, name: str) -> None:
    async with refused("INVALID_REQUEST"):
        await admin.tenants.GetTenant(GetTenantRequest(name=name))


async def test_an_unknown_tenant_is_named(admin: Caller) -> None:
    async with refused("TENANT_NOT_FOUND"):
        await admin.tenants.GetTenant(GetTenantRequest(name="tenants/nobody"))
    async with refused("TENANT_NOT_FOUND"):
        await admin.tenants.DeleteTenant(DeleteTenantRequest(name="tenants/nobody"))
    async with refused("TENANT_NOT_FOUND"):
        await admin.tenants.UpdateTenant(UpdateTenantRequest(tenant=Tenant(name="tenants/nobody", weight=1)))


async def test_of_racing_creations_one_wins(admin: Caller) -> None:
    answers = await asyncio.gather(*(admin.tenant() for _ in range(12)), return_exceptions=True)
    assert sum(isinstance(answer, Tenant) for answer in answers) == 1


async def test_a_retry_gets_the_stored_answer(admin: Caller) -> None:
    request = CreateTenantRequest(tenant_id="demo", tenant=Tenant(weight=3), request_id="r-1")
    answers = await asyncio.gather(*(admin.tenants.CreateTenant(request) for _ in range(8)))
    assert all(answer == answers[0] for answer in answers)
    await admin.tenants.UpdateTenant(UpdateTenantRequest(tenant=Tenant(name="tenants/demo", weight=9)))
    assert (await admin.tenants.CreateTenant(request)) == answers[0]


async def test_a_request_id_belongs_to_one_content_and_method(admin: Caller) -> None:
    await admin.tenants.CreateTenant(CreateTenantRequest(tenant_id="demo", request_id="r-1"))
    async with refused("REQUEST_ID_REUSED"):
        await admin.tenants.CreateTenant(CreateTenantRequest(tenant_id="other", request_id="r-1"))
    async with refused("REQUEST_ID_REUSED"):
        await admin.tenants.DeleteTenant(DeleteTenantRequest(name="tenants/demo", request_id="r-1"))


async def test_a_request_id_is_free_again_after_a_day(admin: Caller, plane: Plane) -> None:
    await admin.tenants.CreateTenant(CreateTenantRequest(tenant_id="demo", request_id="r-1"))
    connection = await asyncpg.connect(plane.database.superuser_dsn)
    await connection.execute("UPDATE controlplane.answered_requests SET answer_time = answer_time - interval '25 h'")
    await connection.close()
    await admin.tenants.CreateTenant(CreateTenantRequest(tenant_id="other", request_id="r-1"))


async def test_an_etag_admits_one_of_racing_updates(admin: Caller) -> None:
    seen = await admin.tenant()

    async def update(weight: int) -> Message:
        changed = Tenant(name=seen.name, weight=weight, etag=seen.etag)
        return await admin.tenants.UpdateTenant(UpdateTenantRequest(tenant=changed))

    answers = await asyncio.gather(*(update(weight) for weight in range(1, 11)), return_exceptions=True)
    assert sum(isinstance(answer, Message) for answer in answers) == 1
    async with refused("ETAG_MISMATCH"):
        await update(99)
    async with refused("ETAG_MISMATCH"):
        await admin.tenants.DeleteTenant(DeleteTenantRequest(name=seen.name, etag=seen.etag))


async def test_a_mask_says_what_changes(admin: Caller) -> None:
    request = CreateTenantRequest(tenant_id="demo", tenant=Tenant(display_name="Demo", weight=7))
    await admin.tenants.CreateTenant(request)
    patch = Tenant(name="tenants/demo", display_name="New", weight=8)
    masked = UpdateTenantRequest(tenant=patch, update_mask=FieldMask(paths=["display_name"]))
    changed = (await admin.tenants.UpdateTenant(masked)).tenant
    assert (changed.display_name, changed.weight) == ("New", 7)
    cleared = UpdateTenantRequest(tenant=Tenant(name="tenants/demo"), update_mask=FieldMask(paths=["weight"]))
    assert (await admin.tenants.UpdateTenant(cleared)).tenant.weight == 0


async def test_an_update_that_changes_nothing_leaves_the_etag(admin: Caller) -> None:
    seen = await admin.tenant()
    same = await admin.tenants.UpdateTenant(UpdateTenantRequest(tenant=Tenant(name=seen.name, display_name="")))
    assert same.tenant == seen


@pytest.mark.parametrize("path", ["name", "etag", "nothing", "weight.x", ""])
async def test_a_mask_with_a_field_that_cannot_change_is_refused(admin: Caller, path: str) -> None:
    await admin.tenant()
    async with refused("INVALID_REQUEST"):
        await admin.tenants.UpdateTenant(
            UpdateTenantRequest(tenant=Tenant(name="tenants/demo", weight=1), update_mask=FieldMask(paths=[path]))
        )


async def test_a_tenant_made_again_has_another_etag(admin: Caller) -> None:
    first = await admin.tenant()
    await admin.tenants.DeleteTenant(DeleteTenantRequest(name=first.name))
    assert (await admin.tenant()).etag != first.etag


async def test_pages_hold_every_tenant_once(admin: Caller) -> None:
    names = [f"t-{number:02}" for number in range(7)]
    for name in names:
        await admin.tenant(name)
    found: list[str] = []
    token = ""
    for _ in range(4):
        page = await admin.tenants.ListTenants(ListTenantsRequest(page_size=2, page_token=token))
        found += [tenant.name for tenant in page.tenants]
        token = page.next_page_token
    assert found == [f"tenants/{name}" for name in names]
    assert token == ""


@pytest.mark.parametrize("token", ["x", "AAAA", "\N{GREEK SMALL LETTER ALPHA}", "A" * 512])
async def test_a_page_token_of_nobody_is_refused(admin: Caller, token: str) -> None:
    async with refused("PAGE_TOKEN_INVALID"):
        await admin.tenants.ListTenants(ListTenantsRequest(page_token=token))


async def test_a_tenant_with_agents_goes_only_by_force(admin: Caller) -> None:
    await admin.tenant()
    await admin.agent()
    async with refused("NOT_EMPTY"):
        await admin.tenants.DeleteTenant(DeleteTenantRequest(name="tenants/demo"))
    request = DeleteTenantRequest(name="tenants/demo", force=True, request_id="gone")
    await admin.tenants.DeleteTenant(request)
    await admin.tenants.DeleteTenant(request)  # A retry of what was done is no error.
    async with refused("TENANT_NOT_FOUND"):
        await admin.agent("other")


async def test_a_text_that_cannot_be_stored_is_refused(admin: Caller) -> None:
    for request in (
        CreateTenantRequest(tenant_id="demo", tenant=Tenant(display_name="a\0b")),
        CreateTenantRequest(tenant_id="demo", request_id="a\0b"),
    ):
        async with refused("CONTENT_INVALID"):
            await admin.tenants.CreateTenant(request)


async def test_a_tenants_own_subject_may_read_its_tenant_alone(admin: Caller, plane: Plane) -> None:
    await admin.tenant("demo")
    await admin.tenant("acme")
    async with plane.caller("demo", "channel") as demo:
        await demo.tenants.GetTenant(GetTenantRequest(name="tenants/demo"))
        async with refused("PERMISSION_DENIED"):
            await demo.tenants.GetTenant(GetTenantRequest(name="tenants/acme"))
        async with refused("PERMISSION_DENIED"):
            await demo.tenants.ListTenants(ListTenantsRequest())
        async with refused("PERMISSION_DENIED"):
            await demo.tenants.UpdateTenant(UpdateTenantRequest(tenant=Tenant(name="tenants/demo", weight=9)))
