"""The command line as a user meets it: answers, exit codes, no traceback, torch untouched where only text is read."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from config_samples import BASE, text_of, variant

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = (
    "import sys\n"
    "for name in ('torch', 'deepspeed', 'transformers', 'triton', 'numpy', 'tokenizers'): sys.modules[name] = None\n"
    "from longctx.cli.main import main\n"
    "main(sys.argv[1:])\n"
)
LIBRARIES = "import typer, pydantic, yaml; pydantic.create_model('M', x=(int, 1))"
# On an idle core the three libraries that every answer needs take 0.2 s; 2.5 times that is half a second.
LIBRARY_TIMES = 2.5


def run(
    *arguments: object, code: str = BLOCKED, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, torch and its like blocked."""
    clean = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    clean |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "COLUMNS": "200", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=clean,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text_of(variant(output__folder=str(tmp_path / "run"))))
    return path


def test_version_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"longctx {project['version']}\n", "")


def test_check_says_what_will_run(good: Path):
    done = run("check", good)
    assert done.returncode == 0, done.stderr
    assert "no mistake found" in done.stdout and "4 = data 2 x ring 2" in done.stdout
    assert "2,048 on each rank" in done.stdout and "4 rows = 1 x 2 accumulated x 2 replicas" in done.stdout


def test_check_reports_everything_at_once_with_exit_code_2(good: Path):
    good.write_text(good.read_text().replace("steps: 100", "stepz: 100").replace("lr: 0.001", "lr: fast"))
    done = run("check", good, "zero.stage=9")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 3 and "Traceback" not in done.stderr
    assert (
        "did you mean 'train.steps'" in lines[0]
        and "got 'fast'" in lines[1]
        and lines[2].startswith("override zero.stage")
    )
    assert all(line.startswith(f"{good}:") for line in lines[:2])


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("check", "missing.yaml"), 2, "missing.yaml  does not exist"),
        (("check",), 2, "CONFIG"),
        (("chek", "x"), 2, "check"),
        (("explain", "train.clips"), 2, "did you mean 'train.clip'"),
        (("explain", "train.lr=1"), 2, "give its file first"),
        (("init", "--preset", "huge"), 2, "cpu-tiny"),
        (("train", "missing.yaml"), 2, "does not exist"),
        (("plot", "no-such-run"), 1, "longctx: "),
        (("data", "build", "missing.yaml"), 2, "does not exist"),
    ],
)
def test_mistakes_are_one_message_and_a_code(arguments: tuple[str, ...], code: int, named: str, tmp_path: Path):
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert named in done.stderr + done.stdout and len(done.stderr.splitlines()) <= 8


def test_explain_with_and_without_a_file(good: Path):
    every = run("explain", good).stdout
    assert "train.lr" in every and f"{good}:" in every and "derived.accumulation" in every
    one = run("explain", good, "train.lr", "train.lr=0.5").stdout
    assert "train.lr = 0.5  (override train.lr)" in one and "peak learning rate" in one
    assert "train.steps  (required)" in run("explain", "train.steps").stdout


def test_schema_is_json_with_every_section():
    schema = json.loads(run("schema").stdout)
    assert set(BASE) | {"deepspeed", "fp16", "launch", "memory"} == set(schema["properties"])


def test_init_writes_a_file_that_passes_check_and_spares_an_existing_one(tmp_path: Path):
    path = tmp_path / "new.yaml"
    assert run("init", path, cwd=tmp_path).returncode == 0
    assert run("check", path, cwd=tmp_path).returncode == 0
    before = path.read_text()
    done = run("init", path, "--preset", "64-gpu-1M")
    assert done.returncode == 2 and "left alone" in done.stderr and path.read_text() == before
    assert run("init", tmp_path / "none" / "x.yaml").returncode == 2
    assert run("init").stdout == before
    spaced = run("init", tmp_path / "my runs.yaml")
    assert spaced.stdout.count(f"'{tmp_path / 'my runs.yaml'}'") == 2  # ready to be pasted into a shell


def test_train_inside_a_launched_job_is_refused(good: Path):
    done = run("train", good, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 1 and "launch/train.py" in done.stderr and "Traceback" not in done.stderr
    assert "WORLD_SIZE=2, RANK=0" in done.stderr
    done = run("train", good, SLURM_STEP_NUM_TASKS="3", SLURM_PROCID="1")
    assert done.returncode == 1 and "SLURM_STEP_NUM_TASKS=3, SLURM_PROCID=1" in done.stderr
    done = run("generate", good.parent, "--prompt", "x", PMI_SIZE="3", PMI_RANK="1")
    assert done.returncode == 1 and "PMI_SIZE=3, PMI_RANK=1" in done.stderr


def test_a_shell_in_a_world_of_one_is_no_launched_job(good: Path):
    done = run("train", good, "checkpoint.resume=must", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0", RANK="1")
    assert done.returncode == 2 and "holds no checkpoint" in done.stderr  # it got as far as the run directory


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


def cpu_seconds(*arguments: object, code: str = BLOCKED) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(*arguments, code=code).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", ["check", "explain", "schema", "init", "plan"])
def test_answers_within_half_a_second(command: str, good: Path):
    """CPU time of the whole process against that of the libraries alone, in turns, so that load cancels out."""
    more = {"check": [str(good)], "explain": [str(good)], "plan": ["--help"]}
    arguments = [command, *more.get(command, [])]
    pairs = [(cpu_seconds(*arguments), cpu_seconds(code=LIBRARIES)) for _ in range(3)]
    assert min(mine for mine, _ in pairs) <= LIBRARY_TIMES * min(libraries for _, libraries in pairs), pairs


def test_help_lists_only_commands_that_do_something():
    text = run("--help").stdout
    for command in ("train", "check", "plan", "explain", "schema", "init", "data", "plot", "doctor"):
        assert f"  {command} " in text
    assert run().returncode == 2
