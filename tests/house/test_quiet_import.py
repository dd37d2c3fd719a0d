"""Importing longctx is quick and loads nothing heavy; what answers at once answers with torch blocked."""

from __future__ import annotations

import subprocess
import sys
import time

from house_files import ROOT, modules

HEAVY = ("torch", "triton", "deepspeed", "transformers", "numpy", "mpi4py", "matplotlib")
BLOCK = "import sys\nfor name in {heavy!r}:\n    sys.modules[name] = None\n"
OPTIONAL = ("triton", "mpi4py", "matplotlib", "datasets", "tensorboard")
IMPORT_ALL = "import importlib\nfor name in {names!r}:\n    importlib.import_module(name)"
QUICK = ("longctx.config", "longctx.launch", "longctx.cli.main")


def run(code: str) -> tuple[str, float]:
    """Run ``code`` in a fresh interpreter at the root; return what it printed and the seconds it took."""
    started = time.monotonic()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - started


def test_import_longctx_loads_nothing_heavy() -> None:
    out, _ = run(f"import sys, longctx\nprint([name for name in {HEAVY!r} if name in sys.modules])")
    assert out.strip() == "[]"


def test_quick_parts_import_with_everything_heavy_blocked() -> None:
    quick = [name for name, _ in modules() if name.startswith(QUICK)]
    assert quick, "config, launch and cli exist"
    run(BLOCK.format(heavy=HEAVY) + IMPORT_ALL.format(names=quick))


def test_every_module_imports_without_cuda_mpi_or_triton() -> None:
    every = [name for name, _ in modules() if not name.startswith("longctx.kernels.")]
    names = [name for name in every if not name.endswith("triton")]  # imported when that backend is asked for
    run(BLOCK.format(heavy=OPTIONAL) + IMPORT_ALL.format(names=names))


def test_the_table_of_contents_is_whole() -> None:
    out, _ = run("import longctx\nprint([name for name in longctx.__all__ if getattr(longctx, name) is None])")
    assert out.strip() == "[]"
    out, _ = run("import longctx\nprint(sorted(set(longctx.__all__) - set(dir(longctx))))")
    assert out.strip() == "[]"
