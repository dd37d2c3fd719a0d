"""Every error for users is a LongctxError and a ValueError."""

from __future__ import annotations

import pytest

import longctx
from longctx import errors

OURS = [value for value in vars(errors).values() if isinstance(value, type)]


@pytest.mark.parametrize("kind", OURS)
def test_callers_catch_them_with_and_without_longctx(kind: type[Exception]) -> None:
    assert issubclass(kind, longctx.LongctxError) and issubclass(kind, ValueError)
    assert kind.__doc__ and str(kind("what to change")) == "what to change"


def test_a_missing_package_is_an_import_error_too() -> None:
    with pytest.raises(ImportError):
        raise errors.MissingPackageError("pip install it")
