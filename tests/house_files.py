"""Which files are ours: what git tracks or would track, so that a virtual environment or a run is never looked at."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@cache
def project_files() -> tuple[Path, ...]:
    """Every file of the project, relative to the root. Outside a checkout (an sdist), all but hidden folders and the
    copies of the operators in ``longctx/kernels``, which are links in a checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        names = [Path(line) for line in listed.stdout.splitlines()]
    else:
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        names = [path for path in names if not any(part.startswith(".") or part == "build" for part in path.parts)]
        names = [path for path in names if path.parts[:2] != ("longctx", "kernels") or len(path.parts) == 3]
    return tuple(sorted(path for path in set(names) if (ROOT / path).is_file()))


def python_files(*folders: str) -> list[Path]:
    """Python files below ``folders`` (all, if none is given), relative to the root."""
    return [path for path in project_files() if path.suffix == ".py" and (not folders or path.parts[0] in folders)]


def modules() -> list[tuple[str, Path]]:
    """(dotted name, absolute path) of every module of the library, operators under ``longctx.kernels``."""
    found = []
    for path in python_files("longctx", "kernels"):
        parts = (("longctx",) if path.parts[0] == "kernels" else ()) + path.with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), ROOT / path))
    return found
