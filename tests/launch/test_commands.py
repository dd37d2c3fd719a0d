"""What is run: lists of arguments whose only values are names and one path; and nothing that a shell could read."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launch_samples import HOSTILE, config, hostile, make_spec

from longctx.cli.main import main
from longctx.errors import ConfigError, LaunchError
from longctx.launch.cluster import jobspec
from longctx.launch.cluster.commands import commands, remote, ssh

HOSTS = (("a", 2), ("b", 2))
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=30)


def test_500_hostile_strings_arrive_unchanged_through_a_shell(tmp_path: Path) -> None:
    """ssh hands its one argument to the other side's shell; here `sh -c` does what it does, and sshd in test_real."""
    launch = config("{launcher: deepspeed, hosts: [a]}").launch

    def arrives(words: list[str]) -> None:
        command = ssh("a", ["printf", "%s\\0", *words], launch)[-1]
        shown = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, check=True)
        assert shown.stdout == b"".join(os.fsencode(word) + b"\0" for word in words) and not shown.stderr

    @settings(max_examples=100)
    @given(st.lists(texts | st.sampled_from(HOSTILE), min_size=1, max_size=4))
    @example(list(HOSTILE))
    def any_others(words: list[str]) -> None:
        arrives(words)

    for word in hostile(500):
        arrives([word])
    any_others()
    assert not list(tmp_path.iterdir())


def test_500_hostile_names_are_refused_and_values_stay_in_the_job_spec(tmp_path: Path) -> None:
    """A host, an interface, a variable's name is a word or none; a path or a value never meets a command line."""
    for word in hostile(500):
        if re.fullmatch("[A-Za-z0-9.-]+[*]?", word, re.ASCII):
            continue  # a beginning of variables' names, perhaps
        for key, names in (("hosts", [word]), ("environment", [word]), ("interface", word)):
            with pytest.raises(ConfigError):
                config(json.dumps({"launcher": "deepspeed", "hosts": ["a"], key: names}))
        values = make_spec(tmp_path, environment={"A": word}, output=word, config=word, command=(word,))
        jobspec.save(values, tmp_path / "ticket.json")
        assert jobspec.load(tmp_path / "ticket.json") == values
    assert [path.name for path in tmp_path.iterdir()] == ["ticket.json"]


@pytest.mark.parametrize("launcher", ["deepspeed", "openmpi", "mpich", "slurm"])
def test_the_command_line_holds_the_path_of_the_job_spec_and_nothing_else(launcher: str) -> None:
    launch = config(f"{{launcher: {launcher}, hosts: [a, b]}}").launch
    for command in commands(launch, HOSTS, "/opt/my python", "/src/$(id)", "/run dir/ticket.json"):
        words = list(command.argv)
        if launcher == "deepspeed":
            assert words[:-1] == list(words[:-1]) and words[-2] == command.label and words[-3] == "--"
            listed = subprocess.run(["sh", "-c", f"printf '%s\\0' {words[-1]}"], capture_output=True, text=True)
            words = listed.stdout.rstrip("\0").split("\0")
        start = words.index("env")
        assert words[start : start + 4] == ["env", "PYTHONPATH=/src/$(id)", "/opt/my python", "-m"]
        assert words[-2:] == ["longctx.launch.cluster.agent", "/run dir/ticket.json"]


def test_each_launcher_by_its_own_words() -> None:
    def argv(launch: str) -> str:
        return " ".join(commands(config(launch).launch, HOSTS, "python", "", "t")[0].argv)

    assert argv("{launcher: openmpi, hosts: [a, b], ssh_port: 22, interface: eth0}") == (
        "mpirun -n 4 --host a:2,b:2 --map-by slot --bind-to none --prtemca plm_ssh_args -p 22 --prtemca "
        "oob_tcp_keepalive_time 7 --prtemca oob_tcp_keepalive_intvl 4 --prtemca oob_tcp_keepalive_probes 3 --prtemca "
        "prte_if_include eth0 python -m longctx.launch.cluster.agent t"
    )
    assert argv("{launcher: mpich, hosts: [a, b]}") == (
        "mpiexec.hydra -launcher ssh -genvlist HOME,LANG,LD_LIBRARY_PATH,LOGNAME,PATH,SHELL,TMPDIR,TZ,USER,"
        "XDG_CACHE_HOME -n 4 -hosts a:2,b:2 python -m longctx.launch.cluster.agent t"
    )
    assert argv("{launcher: mpich, hosts: [a, b], ssh_port: 22, ssh_options: [User=x]}").startswith(
        "env HYDRA_LAUNCHER_EXTRA_ARGS=-o User=x -p 22 mpiexec.hydra "
    )
    assert argv("{launcher: slurm, hosts: [a, b], options: ['--partition=gpu']}").startswith(
        "srun --ntasks=4 --nodes=2 --ntasks-per-node=2 --nodelist=a,b --distribution=block"
    )
    assert "--partition=gpu python" in argv("{launcher: slurm, hosts: [a, b], options: ['--partition=gpu']}")
    with pytest.raises(LaunchError, match="as many ranks on every host"):
        commands(config("{launcher: slurm, hosts: [a, b]}").launch, (("a", 2), ("b", 1)), "python", "", "t")
    assert remote("python", "", ["x"]) == ["python", "x"]


def test_print_shows_everything_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_run import write

    path = write(tmp_path)
    path.write_text(path.read_text() + "launch: {launcher: deepspeed, hosts: [one, two], environment: [SECRET_*]}\n")
    monkeypatch.setenv("SECRET_KEY", "canary-in-the-environment")
    before = sorted(tmp_path.rglob("*"))

    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError(f"ran {arguments}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    main_code = []
    try:
        main(["launch", str(path), "--print", "mesh.data=2"])
    except SystemExit as end:
        main_code.append(end.code)
    shown = capsys.readouterr().out
    assert main_code == [0] and sorted(tmp_path.rglob("*")) == before
    assert "SECRET_KEY (25 characters)" in shown and "canary" not in shown
    assert "deepspeed: 4 ranks on 2 hosts" in shown and "0 of 4 hops" in shown
    assert shown.count("ssh -T") == 2 and f"{tmp_path}/run/launch/ticket.json" in shown
    assert "GLOO_SOCKET_IFNAME" in shown


def test_a_job_spec_is_private_and_arrives_unchanged(tmp_path: Path) -> None:
    environment = {f"NAME_{number}": text for number, text in enumerate(HOSTILE)}
    given_spec = make_spec(tmp_path, environment=environment, command=("a", *HOSTILE))
    folder = tmp_path / "private"
    jobspec.make_private(folder)
    path = folder / "ticket.json"
    path.symlink_to(tmp_path / "elsewhere")  # planted: replaced, not followed
    jobspec.save(given_spec, path)
    assert jobspec.load(path) == given_spec and not (tmp_path / "elsewhere").exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [given_spec.seat(rank) for rank in range(3)] == [("a", 0, 2), ("a", 1, 2), ("b", 0, 1)]
    path.chmod(0o640)
    with pytest.raises(LaunchError, match="not private"):
        jobspec.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hosts": 3}', "null", '{"hosts": [], "command": [], "x": 1}'])
def test_a_damaged_job_spec_is_an_error_not_a_traceback(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ticket.json"
    jobspec.write_private(path, text)
    with pytest.raises(LaunchError, match="cannot be read"):
        jobspec.load(path)
    path.unlink()
    with pytest.raises(LaunchError, match="storage that all hosts share"):
        jobspec.load(path)
    assert json.dumps(make_spec(tmp_path)._asdict())
