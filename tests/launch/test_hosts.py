"""Host names, hostfiles, placement and the environment that travels: text and arithmetic."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from launch_samples import config

from longctx.config.derived import derive
from longctx.config.hosts import Host, once_each, parse_host, parse_hostfile, ssh_option
from longctx.errors import ConfigError, LaunchError
from longctx.launch.cluster.hosts import default_world, hosts_of, with_slots
from longctx.launch.cluster.placement import place, table
from longctx.launch.cluster.run import plan_job, without
from longctx.launch.environment import travelling
from longctx.network import address_towards, interface_with, sockets


def test_hosts_as_people_write_them() -> None:
    assert parse_host("node-1.cluster.local") == Host("node-1.cluster.local", None)
    assert parse_host("10.0.0.7:8") == Host("10.0.0.7", 8)
    assert parse_host("gpu_node_1_:2") == Host("gpu_node_1_", 2)
    assert parse_host("me@node1:2") == Host("me@node1", 2)
    text = "# the good ones\nnode1 slots=4\n\nnode2   slots=2  # half\nnode3\n"
    assert parse_hostfile(text) == (Host("node1", 4), Host("node2", 2), Host("node3", None))
    assert parse_hostfile("\ufeff" + text.replace("\n", "\r\n")) == parse_hostfile(text)  # from Windows


def test_a_user_is_for_ssh_alone() -> None:
    hosts = "hosts: ['me@a_1:2', 'you@127.0.0.1:2']"
    described = config(f"{{launcher: deepspeed, {hosts}}}", "mesh.world=4")
    job = plan_job(described, derive(described, 4))
    assert [command.argv[command.argv.index("--") + 1] for command in job.commands] == ["me@a_1", "you@127.0.0.1"]
    assert all("--master_addr=a_1 " in command.argv[-1] for command in job.commands)
    with pytest.raises(LaunchError, match="twice"):
        once_each([Host("me@a"), Host("a")])
    for launcher in ("openmpi", "mpich", "slurm"):
        with pytest.raises(ConfigError, match=r"me@a_1 names a user.*write a_1, and launch.ssh_options: \[User=me\]"):
            config(f"{{launcher: {launcher}, {hosts}}}", "mesh.world=4")


def test_a_user_in_a_hostfile_is_for_ssh_alone(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes("\ufeffme@a slots=2\n".encode())
    described = config(f"{{launcher: deepspeed, hostfile: {path}}}")
    assert hosts_of(described.launch) == (Host("me@a", 2),)
    with pytest.raises(LaunchError, match="me@a names a user"):
        hosts_of(described.launch.model_copy(update={"launcher": "openmpi"}))


@given(st.text(max_size=40) | st.from_regex(r"[A-Za-z0-9.;$`|&<>( -]{1,20}", fullmatch=True))
@example("-oProxyCommand=touch x")
@example("a;b")
@example("$(id)")
@example("a\nb")
@example("a:0")
@example("root@h")
@example("-oProxyCommand=x@h")
@example("a@b@c")
def test_a_host_is_a_word_or_refused(text: str) -> None:
    try:
        host = parse_host(text)
    except LaunchError:
        return
    word = r"([A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_])?"
    assert re.fullmatch(word, host.name, re.ASCII)
    assert text in (host.name, f"{host.name}:{host.slots}")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no host"),
        ("a slots=0", "line 1"),
        ("a\nb slots=x", "line 2"),
        ("a\na", "twice"),
        ("a slots=2 max=4", "line 1"),
        ("a:4", "line 1"),
        ("-a", "line 1"),
        ("a extra", "slots=4"),
    ],
)
def test_hostfiles_that_are_none(text: str, named: str) -> None:
    with pytest.raises(LaunchError, match=named):
        parse_hostfile(text)


def test_the_same_host_in_other_letters_is_the_same() -> None:
    with pytest.raises(LaunchError, match="twice"):
        once_each([Host("Node1"), Host("node1")])


@pytest.mark.parametrize(
    "option",
    [
        "ProxyCommand=x",
        "LocalCommand=x",
        "PermitLocalCommand=yes",
        "Include=/x",
        "User=a b",
        "x",
        "User=$(id)",
        "-oUser=x",
        "Match=exec",
        "KnownHostsCommand=x",
        "SetEnv=A=b",
        "SendEnv=*",
        "PKCS11Provider=x",
    ],
)
def test_ssh_options_that_run_something_are_refused(option: str) -> None:
    assert ssh_option(option)
    with pytest.raises(ConfigError, match="launch.ssh_options"):
        config(f"{{launcher: deepspeed, hosts: [a], ssh_options: ['{option}']}}")


def test_the_section_is_checked_as_a_whole() -> None:
    for launch, named in {
        "{launcher: deepspeed}": "launch.hosts",
        "{hosts: [a]}": "not read by launcher local",
        "{launcher: openmpi, hosts: [a, a]}": "twice",
        "{launcher: openmpi, hosts: [a], hostfile: b}": "launch.hostfile",
        "{launcher: slurm, hosts: [a], ssh_port: 3}": "ssh_port",
        "{launcher: deepspeed, hosts: [a], options: ['-x']}": "launch.options",
        "{launcher: deepspeed, hosts: [a], interface: 'eth 0'}": "launch.interface",
        "{launcher: deepspeed, hosts: [a], environment: ['A=b']}": "launch.environment",
        "{launcher: deepspeed, hosts: ['a;b']}": "not a host",
    }.items():
        with pytest.raises(ConfigError, match=named):
            config(launch)
    with pytest.raises(ConfigError, match="resume is never"):
        config("{launcher: deepspeed, hosts: [a], restarts: 1}", "checkpoint.resume=never")


def test_the_world_is_what_the_hosts_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    run = config("{launcher: deepspeed, hosts: ['a:3', 'b:5']}", "mesh.ring=4")
    assert default_world(run) == 8 and run.mesh.sizes(8).data == 2
    (tmp_path / "hosts").write_text("x slots=2\ny\n")
    run = config(f"{{launcher: deepspeed, hostfile: {tmp_path}/hosts, ranks_per_host: 1}}", "mesh.ring=3")
    assert hosts_of(run.launch) == (Host("x", 2), Host("y", None)) and default_world(run) == 3
    assert with_slots(hosts_of(run.launch), run.launch, 3) == (("x", 2), ("y", 1))
    run = config("{launcher: openmpi, hosts: [a, b]}", "mesh.ring=2", "mesh.data=4")
    assert with_slots(hosts_of(run.launch), run.launch, 8) == (("a", 4), ("b", 4))
    with pytest.raises(LaunchError, match="no host is named"):
        hosts_of(config("{launcher: slurm}").launch)


def test_placement() -> None:
    found = place([("a", 4), ("b", 4)], ring=4, ulysses=2, data=1)
    assert [tuple(item) for item in found.places][3:5] == [(3, "a", 3, 0, 1, 1), (4, "b", 0, 0, 2, 0)]
    assert found.hosts == (("a", 4), ("b", 4)) and found.split_ulysses == 0
    assert found.hops_between_hosts == 4  # out and back, for each of the two rings
    assert place([("a", 2), ("b", 2)], 2, 1, 2).hops_between_hosts == 0
    odd = place([("a", 3), ("b", 3)], 3, 2, 1)
    assert odd.split_ulysses == 1 and "warning: 1 ulysses groups" in table(odd)[-1]
    assert place([("a", 8), ("b", 8)], 4, 1, 1).hosts == (("a", 4),)
    with pytest.raises(LaunchError, match="has 8 ranks, but the hosts take 6: a 3, b 3"):
        place([("a", 3), ("b", 3)], 4, 2, 1)


def test_what_is_left_of_a_job_without_a_host(capsys: pytest.CaptureFixture[str]) -> None:
    run = config("{launcher: deepspeed, hosts: ['a:2', 'b:2', 'c:4']}", "mesh.ring=2", "train.global_batch=12")
    run = run.model_copy(update={"train": run.train.model_copy(update={"global_batch": None, "micro_batch": 3})})
    sizes = derive(run, 8)
    job = plan_job(run, sizes)
    fewer = without(job, sizes, frozenset({"b"}))
    assert fewer is not None and fewer.placement.hosts == (("a", 2), ("c", 2))  # 3 replicas do not divide 12 rows
    again = derive(fewer.config, 4)
    assert (again.data, again.ring, again.global_batch, again.accumulation) == (2, 2, 12, 2)
    assert [command.label for command in fewer.commands] == ["a", "c"]
    assert "going on without b: mesh.data is now 2" in capsys.readouterr().err
    last = without(fewer, again, frozenset({"c"}))
    assert last is not None and last.placement.hosts == (("a", 2),)
    assert without(last, again, frozenset({"a"})) is None and without(job, sizes, frozenset()) is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_every_rank_has_one_place(rooms: list[int], ring: int, ulysses: int, data: int) -> None:
    hosts = [(f"h{number}", room) for number, room in enumerate(rooms)]
    if sum(rooms) < ring * ulysses * data:
        return
    found = place(hosts, ring, ulysses, data)
    assert [item.rank for item in found.places] == list(range(ring * ulysses * data))
    assert all(item.rank == (item.data * ring + item.ring) * ulysses + item.ulysses for item in found.places)
    for name, count in found.hosts:
        assert [item.local_rank for item in found.on(name)] == list(range(count)) and count <= dict(hosts)[name]


def test_only_what_is_on_the_list_travels() -> None:
    shell = {"NCCL_DEBUG": "INFO", "HF_TOKEN": "x", "NCCL": "y", "AWS_SECRET": "z", "CUDA_VISIBLE_DEVICES": "3"}
    assert travelling(shell, ("NCCL_*", "CUDA_*")) == {"NCCL_DEBUG": "INFO"}
    assert travelling(shell, ("HF_TOKEN",)) == {"HF_TOKEN": "x"} and travelling(shell, ()) == {}
    defaults = config("{launcher: deepspeed, hosts: [a]}").launch.environment
    assert not any(name in "HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY" for name in travelling(shell, defaults))


def test_the_interface_is_the_one_towards_the_others() -> None:
    assert interface_with(address_towards("127.0.0.1")) == "lo"
    assert interface_with("192.0.2.1") is None
    assert sockets("eth0") == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}
