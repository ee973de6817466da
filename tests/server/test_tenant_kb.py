from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

from kb.encoders.base import EncoderIdentity
from kb.errors import CollectionNotFound
from kb.knowledge_base import KnowledgeBase
from server.api.errors import ApiError
from server.keys import SCOPES, Key
from server.request_context import RequestContext, enter
from server.tenant_kb import TenantKb

ENCODER = EncoderIdentity("test", 4, "sha256:" + "0" * 64)


@pytest.fixture
def kb(tmp_path: Path) -> TenantKb:
    kb = TenantKb(KnowledgeBase.open(tmp_path))
    for name in ("facts", "acme--facts", "beta--facts"):
        kb.create(name, ENCODER)
    return kb


def as_tenant(tenant: str | None, call: Callable[..., Any], *arguments: Any) -> Any:
    def inside() -> Any:
        enter(RequestContext(key=Key("1", "", SCOPES, tenant)))
        return call(*arguments)

    return copy_context().run(inside)


def test_a_tenant_sees_its_own_collections_and_everybodys(kb: TenantKb) -> None:
    seen = {tenant: [info.name for info in as_tenant(tenant, kb.collections)] for tenant in (None, "acme", "beta")}
    assert seen == {
        None: ["acme--facts", "beta--facts", "facts"],
        "acme": ["acme--facts", "facts"],
        "beta": ["beta--facts", "facts"],
    }
    for name in ("facts", "acme--facts"):
        assert as_tenant("acme", kb.collection, name).name == name


def test_others_collections_are_as_if_they_were_not_there(kb: TenantKb) -> None:
    for call in (kb.collection, kb.changing, kb.drop):
        messages = []
        for name in ("beta--facts", "beta--none"):
            with pytest.raises(CollectionNotFound) as error:
                as_tenant("acme", call, name)
            messages.append(str(error.value).replace(name, "X"))
        assert messages[0] == messages[1]
    assert as_tenant(None, kb.collection, "beta--facts").name == "beta--facts"


def test_a_tenant_changes_its_own_only(kb: TenantKb) -> None:
    for call, arguments in ((kb.changing, ()), (kb.drop, ()), (kb.create, (ENCODER,))):
        with pytest.raises(ApiError, match="acme--") as error:
            as_tenant("acme", call, "facts", *arguments)
        assert error.value.status == 403
    with pytest.raises(ApiError):
        as_tenant("acme", kb.create, "beta--more", ENCODER)
    as_tenant("acme", kb.create, "acme--more", ENCODER)
    assert as_tenant("acme", kb.changing, "acme--more").name == "acme--more"
    as_tenant("acme", kb.drop, "acme--more")
    as_tenant(None, kb.drop, "facts")
    assert [info.name for info in as_tenant(None, kb.collections)] == ["acme--facts", "beta--facts"]
