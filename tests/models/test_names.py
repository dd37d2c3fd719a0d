"""Names that saved folders and users' code contain do not change, and need no torch."""

from __future__ import annotations

import subprocess
import sys

from longctx.models.names import NAME, PREFIX


def test_names_are_those_in_saved_folders() -> None:
    assert (NAME, PREFIX) == ("longctx", "longctx_")


def test_reading_them_imports_no_torch() -> None:
    code = "import sys, longctx.models.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
