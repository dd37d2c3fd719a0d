"""Operators are importable as longctx.kernels.* from a checkout, an sdist and a wheel, and wheels hold nothing else."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from house_files import ROOT, project_files

PROBE = "kernels/probe"  # an operator that only these tests have, with a sub-package and a relative import


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=240, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with one more operator in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in project_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    (folder / PROBE / "inner").mkdir(parents=True)
    (folder / PROBE / "__init__.py").write_text("from .inner import ANSWER as ANSWER\n")
    (folder / PROBE / "inner" / "__init__.py").write_text("ANSWER = 42\n")
    for operator in (folder / "kernels").iterdir():
        if operator.is_dir():
            (folder / "longctx" / "kernels" / operator.name).symlink_to(Path("../../kernels", operator.name))
    return folder


DATA = ast.Expr | ast.Import | ast.ImportFrom | ast.Assign

ASK = "from longctx.kernels.probe import ANSWER; import longctx, sys; assert ANSWER == 42; print(longctx.__file__)"


def test_every_operator_has_a_link() -> None:
    """In a checkout; an sdist has copies."""
    for operator in filter(Path.is_dir, (ROOT / "kernels").iterdir()):
        if operator.name != "__pycache__":
            linked = ROOT / "longctx" / "kernels" / operator.name
            assert (linked / "__init__.py").is_file(), f"ln -s ../../kernels/{operator.name} longctx/kernels/"
            assert not (ROOT / ".git").exists() or linked.readlink() == Path("../../kernels", operator.name)


def test_kernel_bodies_alone_are_left_out_of_type_checking() -> None:
    """Every function of the modules that mypy is told to ignore is one of Triton's; all others are checked."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        overrides = tomllib.load(file)["tool"]["mypy"]["overrides"]
    ignored = [module for override in overrides if override.get("ignore_errors") for module in override["module"]]
    assert ignored
    for module in ignored:
        path = ROOT / module.removeprefix("longctx.").replace(".", "/")
        functions = [x for x in ast.parse(path.with_suffix(".py").read_text()).body if not isinstance(x, DATA)]
        assert functions, module
        for function in functions:
            assert isinstance(function, ast.FunctionDef), f"{module} holds more than kernels"
            assert any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list), function.name


def test_operators_are_found_in_the_checkout(checkout: Path) -> None:
    assert str(checkout) in run(sys.executable, "-c", ASK, cwd=checkout)


def test_the_checkout_does_not_hide_another_kernels_package(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    out = run(sys.executable, "-c", "import kernels; print(kernels.WHOSE)", cwd=checkout, PYTHONPATH=str(tmp_path))
    assert out.strip() == "theirs"


def test_version_is_said_once() -> None:
    import longctx

    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    assert project["version"] == longctx.__version__
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_what_pyproject_asks_for() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    asked = [requirement.split(";")[0] for requirement in stated]  # without markers
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {line.split("==")[0].lower() for line in lines if "==" in line}
    names = {requirement.split(">=")[0].strip().lower() for requirement in asked}
    names -= {"triton"}  # has only a floor: see below
    assert names <= pins, f"not in constraints.txt: {sorted(names - pins)}"
    assert [line for line in lines if "==" not in line] == ["triton>=3.6"], "torch's CUDA build pins its own triton"
    assert all("==" not in requirement for requirement in asked), "pins belong in constraints.txt"


@pytest.mark.slow
def test_wheel_and_sdist(checkout: Path, tmp_path: Path) -> None:
    build = "from setuptools import build_meta as b; import sys; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
    run(sys.executable, "-c", build, "sdist", str(tmp_path), cwd=checkout)
    sdist = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    source = next((tmp_path / "unpacked").iterdir())
    wanted = ("Makefile", "constraints.txt", "configs", "examples/train.yaml", "docs/README.md", "tests/distributed.py")
    for name in (*wanted, "kernels/probe/inner/__init__.py", "longctx/kernels/probe/inner/__init__.py"):
        assert (source / name).exists(), f"the sdist has no {name}"
    run(sys.executable, "-c", build, "wheel", str(tmp_path), cwd=source)  # from the sdist, as an installer would
    wheel = next(tmp_path.glob("*.whl"))
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"longctx"}
    data = {"longctx/py.typed", "longctx/attention/backends/measured.csv"}
    assert data | {"longctx/kernels/probe/inner/__init__.py"} <= set(names)
    block = "import sys\nfor name in ('triton', 'mpi4py'):\n    sys.modules[name] = None\n"
    out = run(sys.executable, "-c", block + ASK, cwd=tmp_path, PYTHONPATH=str(site))
    assert out.startswith(str(site))
    run(
        sys.executable,
        "-c",
        "import longctx; [getattr(longctx, n) for n in longctx.__all__]",
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
