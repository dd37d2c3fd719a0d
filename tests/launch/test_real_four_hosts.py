"""Four hosts with a rank each, so that every hop of the ring is between hosts: `make test-multinode`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import PORT, Hosts
from real_jobs import GONE_SECONDS, finish, start, training, wait_until_empty, write
from tiny_run import losses

from tolerances import tolerance

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    made = Hosts(tmp_path_factory.mktemp("hosts"), 4)
    yield made
    made.close()


def yaml_for(folder: Path, hosts: Hosts, name: str) -> Path:
    keys = f"ssh_port: {PORT}, ssh_options: {json.dumps(hosts.ssh_options)}, silence_seconds: 20"
    return write(folder, name, f"launcher: deepspeed, hosts: [{', '.join(hosts.addresses)}], {keys}")


def test_the_losses_are_those_of_one_machine(hosts: Hosts, tmp_path: Path) -> None:
    code, output = finish(start(write(tmp_path, "local")))
    assert code == 0, output
    code, output = finish(start(yaml_for(tmp_path, hosts, "run")))
    assert code == 0, output
    pairs = list(zip(losses(tmp_path / "run"), losses(tmp_path / "local"), strict=True))
    assert len(pairs) == 5  # a rank has more threads here than there, so the last bits may differ
    for here, there in pairs:
        assert float.fromhex(here) == pytest.approx(float.fromhex(there), rel=tolerance("training loss"))
    wait_until_empty(hosts, time.monotonic())


def test_a_dead_host_ends_the_job_on_the_three_others(hosts: Hosts, tmp_path: Path) -> None:
    process = training(yaml_for(tmp_path, hosts, "run"))
    since = time.monotonic()
    hosts.unplug(2)
    code, output = finish(process, GONE_SECONDS)
    assert code == 1 and f"rank 2 on {hosts.addresses[2]} was lost: nothing was received from it" in output, output
    wait_until_empty(hosts, since)
    hosts.plug_in(2)
