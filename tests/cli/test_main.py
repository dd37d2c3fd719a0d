"""The command line as a user meets it: answers, exit codes, no traceback, torch untouched where only text is read."""

from __future__ import annotations

import json
import resource
import tomllib
from pathlib import Path

import pytest
from command_line import BLOCKED, ROOT, run
from config_samples import BASE, text_of, variant

from longctx.cli.main import main

LIBRARIES = "import typer, pydantic, yaml; pydantic.create_model('M', x=(int, 1))"
# On an idle core the three libraries that every answer needs take 0.2 s; 2.5 times that is half a second.
LIBRARY_TIMES = 2.5


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


def exits(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def test_any_error_of_the_system_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that no command foresaw."""

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "loss.png"))

    monkeypatch.setattr("longctx.train.report.plot.plot_loss", full)
    assert exits(["plot", str(tmp_path)]) == 1
    assert "loss.png: No space left on device; make it available" in capsys.readouterr().err
