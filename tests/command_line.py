"""Run the command line in a child process that cannot import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


BLOCKED = (
    "import sys\n"
    "for name in ('torch', 'deepspeed', 'transformers', 'triton', 'numpy', 'tokenizers'): sys.modules[name] = None\n"
    "from longctx.cli.main import main\n"
    "main(sys.argv[1:])\n"
)


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
