"""The environment variables of a rank on another host: some of its host's, the allow-listed ones, and our own.

No others reach a rank, so a secret in the shell that starts a job stays there unless the YAML lists it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

RESOLVED = "LONGCTX_CONFIG"
"""names the file with the resolved configuration, which all ranks of one machine read"""
# Set by each host or rank itself; another machine's value would be wrong.
_NEVER = {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"}
AGENTS = tuple("HOME LANG LD_LIBRARY_PATH LOGNAME PATH SHELL TMPDIR TZ USER XDG_CACHE_HOME".split())
"""variables for an agent whose launcher (srun, mpiexec) would otherwise pass its whole environment"""
_HOST = (*sorted(_NEVER), *AGENTS, "SLURM_JOB_ID")


def travelling(environment: Mapping[str, str], allowed: Iterable[str]) -> dict[str, str]:
    """Return the variables of ``environment`` that ``allowed`` lists, by name or by prefix (``NCCL_*``)."""
    patterns = tuple(allowed)
    exact = {name for name in patterns if not name.endswith("*")}
    beginnings = tuple(name[:-1] for name in patterns if name.endswith("*"))
    found = {
        name: value
        for name, value in environment.items()
        if name not in _NEVER and (name in exact or (bool(beginnings) and name.startswith(beginnings)))
    }
    return dict(sorted(found.items()))


def of_this_host() -> dict[str, str]:
    """Return the variables that a rank inherits from its host."""
    return {name: os.environ[name] for name in _HOST if name in os.environ}
