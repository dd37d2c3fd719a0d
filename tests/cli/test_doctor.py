"""`longctx doctor`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from command_line import ROOT, run


def test_doctor_names_what_it_saw():
    done = run("doctor", "--json")
    checks = {item["name"]: item for item in json.loads(done.stdout)}
    assert {"python", "torch", "compiler", "extension locks", "disk", "local port"} <= set(checks)
    assert done.returncode == (1 if any(item["status"] == "fail" for item in checks.values()) else 0)
    assert all(item["fix"] for item in checks.values() if item["status"] == "fail")


def test_doctor_asks_for_the_versions_that_the_package_declares():
    from longctx.cli.doctor import _TESTED
    from longctx.models.register import OLDEST

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = dict(requirement.split(">=") for requirement in project["dependencies"])
    assert {name: low for name, (low, _) in _TESTED.items()} == {name: floors[name] for name in _TESTED}
    assert floors["transformers"] == ".".join(map(str, OLDEST))


def test_doctor_finds_a_stale_lock(tmp_path: Path):
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()
    done = run("doctor", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.returncode == 1 and f"rm {tmp_path}/deepspeed_shm_comm/lock" in done.stdout


def test_doctor_finds_a_missing_compiler():
    done = run("doctor", CXX="no-such-compiler")
    assert done.returncode == 1 and "no C++ compiler" in done.stdout
