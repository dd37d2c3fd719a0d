"""Patched attributes and variables are restored as they were, also when the block fails."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from longctx.patched import patched, patched_environ


def test_an_attribute_is_restored_when_the_block_fails() -> None:
    owner = SimpleNamespace(name="before", other=None)
    with pytest.raises(RuntimeError), patched(owner, name="within", other=1):
        assert (owner.name, owner.other) == ("within", 1)
        raise RuntimeError
    assert (owner.name, owner.other) == ("before", None)


def test_what_the_owner_lacked_or_inherited_is_deleted_again() -> None:
    class Parent:
        def method(self) -> str:
            return "inherited"

    owner = Parent()
    with patched(owner, method=lambda: "patched", extra=1):
        assert owner.method() == "patched"
        assert vars(owner)["extra"] == 1
    assert owner.method() == "inherited"
    assert vars(owner) == {}


def test_a_class_attribute_keeps_its_descriptor() -> None:
    class Owner:
        @staticmethod
        def f() -> int:
            return 1

    kept = vars(Owner)["f"]
    with patched(Owner, f=staticmethod(lambda: 2)):
        assert Owner.f() == 2
    assert vars(Owner)["f"] is kept


def test_variables_are_restored_or_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGCTX_TEST_SET", "1")
    monkeypatch.delenv("LONGCTX_TEST_UNSET", raising=False)
    with pytest.raises(RuntimeError), patched_environ(LONGCTX_TEST_SET="2", LONGCTX_TEST_UNSET="3"):
        assert os.environ["LONGCTX_TEST_SET"] == "2" and os.environ["LONGCTX_TEST_UNSET"] == "3"
        raise RuntimeError
    assert os.environ["LONGCTX_TEST_SET"] == "1" and "LONGCTX_TEST_UNSET" not in os.environ
