"""`launch:`: invalid names, and keys that the chosen launcher ignores, are refused by key."""

from __future__ import annotations

from typing import Any

import pytest
from config_samples import load_variant, refused_by

from longctx.config.launch_rules import RULES

CASES: list[tuple[dict[str, Any], set[str]]] = [
    ({"launcher": "deepspeed"}, {"hosts"}),
    ({"hosts": ["a"]}, {"hosts"}),
    ({"hostfile": "hosts"}, {"hostfile"}),
    ({"launcher": "mpich", "hosts": ["a"], "hostfile": "hosts"}, {"hostfile"}),
    ({"launcher": "deepspeed", "hosts": ["-oProxyCommand=x"]}, {"hosts"}),
    ({"launcher": "deepspeed", "hosts": ["a:2", "a"]}, {"hosts"}),
    ({"launcher": "openmpi", "hosts": ["me@a"]}, {"hosts"}),
    ({"interface": "eth 0"}, {"interface"}),
    ({"environment": ["NCCL_*", "A B"]}, {"environment"}),
    ({"restarts": 1}, {"restarts"}),
    ({"ssh_port": 22, "ssh_options": ["User=me"]}, {"ssh_port", "ssh_options"}),
    ({"launcher": "deepspeed", "hosts": ["a"], "ssh_options": ["ProxyCommand=x"]}, {"ssh_options"}),
    ({"options": ["--partition=gpu"]}, {"options"}),
]


@pytest.mark.parametrize(("launch", "keys"), CASES, ids=lambda value: ",".join(sorted(value)))
def test_illegal_keys_are_refused_by_name(launch: dict[str, Any], keys: set[str]) -> None:
    changes = {f"launch__{key}": value for key, value in launch.items()} | {"checkpoint__resume": "never"}
    assert refused_by(RULES, changes) == {f"launch.{key}" for key in keys}


def test_legal_ones_pass() -> None:
    load_variant(launch__launcher="slurm", launch__options=["--partition=gpu"], launch__restarts=2)
    load_variant(launch__launcher="deepspeed", launch__hosts=["me@a:2", "b"], launch__ssh_options=["User=me"])
