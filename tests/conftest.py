"""What every test shares: one thread, no network, and NaN in memory that nobody has written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels run in triton's interpreter: read when triton is first imported. TRITON_INTERPRET=0 where a GPU is tested.
os.environ.setdefault("TRITON_INTERPRET", "1")
# What DeepSpeed compiles is kept per environment, as the Makefile does: checkouts must not rebuild each other's.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
# One ninja for all: two versions recompile each other's extensions at every start.
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")

import pytest
from hypothesis import HealthCheck, settings

# The same examples every time, so that a red run can be run again; LONGCTX_TEST_RANDOM=1 (make test-slow) draws new
# ones. No deadlines: these machines are shared, and a slow example is not a wrong one.
settings.register_profile(
    "longctx",
    deadline=None,
    derandomize="LONGCTX_TEST_RANDOM" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("longctx")


def only_gpu(config: pytest.Config) -> bool:
    """Whether this is `pytest -m gpu`, which must start where a GPU is and little else: without DeepSpeed."""
    return bool(config.option.markexpr == "gpu")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` imports only files that have such tests: others may need what the machine lacks."""
    if only_gpu(config) and collection_path.name.startswith("test_"):
        return "mark.gpu" not in collection_path.read_text() or None
    return None


ALL_ITEMS: pytest.StashKey[list[pytest.Item]] = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Remember every collected test, also those that ``-m`` is about to deselect."""
    config.stash[ALL_ITEMS] = list(items)


@pytest.fixture
def all_items(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """Every collected test, of all tiers."""
    return request.config.stash[ALL_ITEMS]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile DeepSpeed's extension once, before ranks could race for it, and outside any test's time limit."""
    if not (session.config.option.collectonly or only_gpu(session.config)):
        from longctx.launch.prepare import prepare

        prepare()


def poison_uninitialised_memory() -> None:
    """Make torch.empty return NaN (or the largest integer), so that a test sees a value nobody computed."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory() -> None:
    import torch

    torch.set_num_threads(1)
    poison_uninitialised_memory()


@pytest.fixture(autouse=True)
def _no_rank_left_in_the_runner() -> Iterator[None]:
    """A mesh of one rank that meets in the runner's own process leaves a group and an environment; the next is no
    rank."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
