"""Create the virtual environment that `make` uses: check the machine, then install packages in a working order.

Run by tools/bootstrap.sh with any Python >= 3.11 and no packages. torch comes first, pinned, because DeepSpeed's
setup.py imports it; DeepSpeed next, without build isolation for the same reason; then the rest. DeepSpeed compiles its
CPU communication at the first start, which needs a C++ compiler and Python's headers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROBE = "#include <Python.h>\n#include <vector>\nstd::vector<int> probe(PY_MAJOR_VERSION);\n"
EXTRAS = "dev,plot,tensorboard"


def missing() -> list[str]:
    """Return one message for each thing the machine lacks; each says how to install it."""
    problems = []
    series = f"{sys.version_info.major}.{sys.version_info.minor}"
    try:
        import ensurepip  # noqa: F401  (Debian ships Python without it)
    except ImportError:
        problems.append(
            f"{sys.executable} cannot make virtual environments (no ensurepip).\n"
            f"  Debian, Ubuntu:  apt-get install python{series}-venv"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        problems.append(
            f"the headers of {sys.executable} are missing ({header} is not there).\n"
            f"  Debian, Ubuntu:  apt-get install python{series}-dev\n"
            "  Fedora:          dnf install python3-devel\n"
            "  elsewhere:       PYTHON=/path/to/a/python/with/headers make ..."
        )
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        problems.append(
            f"no C++ compiler: {compiler!r} is not on PATH.\n"
            "  Debian, Ubuntu:  apt-get install g++\n"
            "  Fedora:          dnf install gcc-c++\n"
            "  elsewhere:       CXX=/path/to/compiler make ..."
        )
    elif header.is_file():
        problems.extend(_compile_problem(compiler, header.parent))
    return problems


def _compile_problem(compiler: str, include: Path) -> list[str]:
    """Compile and link one file as DeepSpeed will; return an error message, if any."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE)
        command = [
            compiler,
            "-std=c++17",
            "-fopenmp",
            "-shared",
            "-fPIC",
            f"-I{include}",
            str(source),
            "-o",
            str(source.with_suffix(".so")),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return []
    said = "\n    ".join(done.stderr.strip().splitlines()[:4])
    return [
        f"the C++ compiler {compiler!r} cannot build a Python extension with OpenMP:\n    {said}\n"
        "  Debian, Ubuntu:  apt-get install g++   (or set CXX to a complete compiler)"
    ]


def pip(python: Path, title: str, *arguments: str) -> None:
    """Run one pip install and print its duration; on failure print pip's output and exit."""
    print(f"longctx set-up: {title} … ", end="", flush=True)
    started = time.monotonic()
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        print("failed")
        sys.exit(
            f"{done.stdout}\nerror: pip could not install {title}. Its output is above; the command was\n"
            f"  {' '.join(command)}"
        )
    print(f"{time.monotonic() - started:.0f} s", flush=True)


def compile_extension(python: Path) -> None:
    """Build DeepSpeed's CPU communication now, so that the first run starts as fast as later ones."""
    print("longctx set-up: DeepSpeed's CPU communication (compiled once) … ", end="", flush=True)
    started = time.monotonic()
    command = [str(python), "-m", "longctx.launch.prepare"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    # Not fatal: GPUs do not need it, and a run on CPUs compiles it itself or reports why it cannot.
    print(f"{time.monotonic() - started:.0f} s" if done.returncode == 0 else f"failed\n{done.stdout}", flush=True)


def main() -> None:
    """Check the machine, create the environment, install, and write the stamp file for make."""
    folder = ROOT / sys.argv[1]
    problems = missing()
    if problems:
        sys.exit("\n".join(f"error: {problem}" for problem in problems))
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"longctx set-up: virtual environment in {folder.name} with Python {sys.version.split()[0]}", flush=True)
        venv.create(folder, with_pip=True)
    constrained = ("--constraint", "constraints.txt")
    pip(python, "setuptools and wheel", *constrained, "setuptools", "wheel")
    pip(python, "torch (the large one)", *constrained, "torch==2.13.0")
    pip(python, "deepspeed", *constrained, "--no-build-isolation", "deepspeed")
    pip(python, "longctx and the rest", *constrained, "--no-build-isolation", "--editable", f".[{EXTRAS}]")
    compile_extension(python)
    (folder / ".installed").touch()


if __name__ == "__main__":
    main()
