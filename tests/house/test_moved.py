"""Modules that moved are found under their old names too."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

from longctx.moved import MOVED

PACKAGES = {  # a module became a package of its name: what could be imported from it
    "longctx.bounded.abc": "abc_attention",
    "longctx.bounded.cosine": "cosine_attention",
    "longctx.models.hook": "longctx_attention",
    "longctx.launch.cluster": "without",
    "longctx.train.checkpoint": "Checkpoints",
}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_module_under_its_new_one(old: str) -> None:
    new = importlib.import_module(f"longctx.{MOVED[old]}")
    spec = new.__spec__
    sys.modules.pop(f"longctx.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"longctx.{old} is now longctx.{MOVED[old]}"):
        assert importlib.import_module(f"longctx.{old}") is new
    assert new.__spec__ is spec and new.__name__ == f"longctx.{MOVED[old]}"


@pytest.mark.parametrize(("package", "name"), PACKAGES.items())
def test_a_package_has_the_names_of_the_module_it_was(package: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match="is now"):
        value = getattr(importlib.import_module(package), name)
    assert value.__module__.startswith(package)
    with pytest.raises(AttributeError):
        getattr(importlib.import_module(package), "never_there")  # noqa: B009


def test_names_that_never_were_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("longctx.models.nothing")


def test_imports_that_people_have_written_work_from_a_fresh_start() -> None:
    lines = "from longctx.models.convert import convert\nfrom longctx.models.el import enable_el\n"
    lines += "from longctx.bounded.abc import abc_attention\nfrom longctx.data.tokenfile import TokenFile\n"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
