"""What the environment of a rank is made of: what its host says, what travels by the allow-list, and what we set.

Nothing else reaches a rank, so a token in the shell that starts a job stays there unless the YAML names it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

RESOLVED = "LONGCTX_CONFIG"
"""where the ranks of one machine find the configuration as it was resolved, once for all of them"""
# Chosen by each host or each rank, so another machine's value would be wrong.
_NEVER = {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"}
AGENTS = tuple("HOME LANG LD_LIBRARY_PATH LOGNAME PATH SHELL TMPDIR TZ USER XDG_CACHE_HOME".split())
"""what an agent needs of a launcher that would otherwise hand it everything"""
_HOST = (*sorted(_NEVER), *AGENTS, "SLURM_JOB_ID")


def travelling(environment: Mapping[str, str], allowed: Iterable[str]) -> dict[str, str]:
    """Return the variables of ``environment`` whose names are on the list; ``NCCL_*`` means every such beginning."""
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
    """Return the variables that a rank takes from the host it runs on."""
    return {name: os.environ[name] for name in _HOST if name in os.environ}
