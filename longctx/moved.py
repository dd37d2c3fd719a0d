"""Old names of modules that have moved: importing one gives the module under its new name, and a DeprecationWarning.

Where a module has become a package of the same name, the package's ``__getattr__`` comes from `names_of`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MOVED = {  # old name -> new name, both within longctx
    "attention.call": "attention.operator_common",
    "attention.operator": "attention.operator_common",
    "attention.hybrid_passes": "attention.hybrid.passes",
    "attention.ulysses": "attention.hybrid.ulysses",
    "bounded.memory": "bounded.recurrence",
    "bounded.abc_block": "bounded.abc.block",
    "bounded.abc_chunks": "bounded.abc.chunks",
    "bounded.abc_forms": "bounded.abc.forms",
    "bounded.abc_triton": "bounded.abc.triton",
    "bounded.abc_write": "bounded.abc.write",
    "bounded.weights": "bounded.abc.weights",
    "bounded.control": "bounded.abc.control",
    "bounded.clusters": "bounded.abc.clusters",
    "bounded.fifo": "bounded.abc.fifo",
    "bounded.cosine_chunks": "bounded.cosine.chunks",
    "bounded.cosine_forms": "bounded.cosine.forms",
    "bounded.cosine_triton": "bounded.cosine.triton",
    "bounded.cosine_write": "bounded.cosine.write",
    "bounded.exchange": "bounded.ranks.exchange",
    "bounded.monoid": "bounded.ranks.monoid",
    "bounded.packed": "bounded.ranks.packed",
    "bounded.scan": "bounded.ranks.scan",
    "bounded.sequence": "bounded.ranks.sequence",
    "nn.kept": "nn.saved",
    "nn.memory": "nn.mixers",
    "nn.products": "nn.linear",
    "models.masks": "models.hook.masks",
    "models.documents": "models.hook.documents",
    "models.rope": "models.hook.rope",
    "models.verify": "models.hook.verify",
    "models.probe": "models.hook.position_probe",
    "models.hook.probe": "models.hook.position_probe",
    "models.binding": "models.hook.binding",
    "models.families": "models.hook.families",
    "models.dropout": "models.hook.dropout",
    "models.positions": "models.hook.positions",
    "models.memories": "models.hook.bounded_layer",
    "models.wrapped": "models.hook.wrapped",
    "models.host": "models.activations.host",
    "models.loss": "models.activations.loss",
    "models.mlp": "models.activations.mlp",
    "models.norms": "models.activations.norms",
    "models.recompute": "models.activations.recompute",
    "models.pretrained": "models.load.pretrained",
    "models.scratch": "models.load.scratch",
    "models.zero3": "models.load.zero3",
    "models.classes": "models.load.classes",
    "models.headers": "models.load.headers",
    "models.expected": "models.load.expected",
    "models.reach": "models.load.reach",
    "models.experts": "models.load.experts",
    "models.read_keys": "models.load.read_keys",
    "models.settings": "models.load.settings",
    "models.generate": "generation.generate",
    "models.el": "generation.el",
    "models.beams": "generation.beams",
    "models.projections": "generation.projections",
    "engine.memory": "engine.activations",
    "engine.accumulation": "engine.step.accumulation",
    "engine.window": "engine.step.window",
    "engine.rows": "engine.step.rows",
    "engine.rowcheck": "engine.step.rowcheck",
    "engine.loss": "engine.step.loss",
    "engine.lossmean": "engine.step.lossmean",
    "engine.logprobs": "engine.step.logprobs",
    "engine.extension": "engine.cpu_extension",
    "engine.zero.extension": "engine.cpu_extension",
    "generation.run": "generation.generator",
    "engine.stock": "engine.overrides",
    "engine.probe": "engine.gradient_probe",
    "engine.guard": "engine.zero.guard",
    "engine.hpz": "engine.zero.hpz",
    "engine.nvme": "engine.zero.nvme",
    "engine.universal": "engine.zero.universal",
    "engine.order": "engine.zero.order",
    "engine.fp16": "engine.zero.fp16",
    "engine.trace": "engine.zero.trace",
    "launch.agent": "launch.cluster.agent",
    "launch.commands": "launch.cluster.commands",
    "launch.control": "launch.cluster.control",
    "launch.facts": "launch.cluster.facts",
    "launch.hosts": "launch.cluster.hosts",
    "launch.members": "launch.cluster.connections",
    "launch.placement": "launch.cluster.placement",
    "launch.supervise": "launch.cluster.supervise",
    "launch.ticket": "launch.cluster.jobspec",
    "launch.generate": "cli.generate",
    "launch.doctor": "cli.doctor",
    "launch.show": "cli.launch_print",
    "launch.explain": "cli.explain",
    "launch.export": "cli.export",
    "plan.command": "cli.plan",
    "plan.live": "plan.states",
    "config.room": "config.topology",
    "config.split": "config.ulysses",
    "launch.rehearse": "rehearse.world",
    "plan.rehearse": "rehearse.step",
    "train.agree": "collectives",
    "train.manifest": "train.checkpoint.manifest",
    "train.store": "train.checkpoint.store",
    "train.reshape": "train.checkpoint.reshape",
    "train.safe_load": "train.checkpoint.safe_load",
    "train.swap": "train.checkpoint.swap",
    "train.same_run": "train.checkpoint.same_run",
    "train.rng": "train.checkpoint.rng",
    "train.export": "train.checkpoint.export",
    "train.export_run": "train.checkpoint.export_run",
    "train.metrics": "train.report.metrics",
    "train.plot": "train.report.plot",
    "train.progress": "train.report.progress",
    "train.sample": "train.report.sample",
    "train.flops": "train.report.flops",
    "train.console": "train.report.console",
    "train.schedule": "train.optimizer",
    "data.tokenizer": "data.tokenizers.tokenizer",
    "data.tokenizer_file": "data.tokenizers.file",
    "data.tokenizer_folder": "data.tokenizers.folder",
    "data.tokenizer_hash": "data.tokenizers.hash",
    "data.tokenizer_kinds": "data.tokenizers.kinds",
    "data.special": "data.tokenizers.special",
    "data.text": "data.sources.text",
    "data.readers": "data.sources.readers",
    "data.formats": "data.sources.formats",
    "data.streams": "data.sources.streams",
    "data.tables": "data.sources.tables",
    "data.jsontext": "data.sources.jsontext",
    "data.pieces": "data.sources.pieces",
    "data.folder": "data.sources.folder",
    "data.huggingface": "data.sources.huggingface",
    "data.document": "data.sources.document",
    "data.tokenfile": "data.tokens.file",
    "data.tokenformat": "data.tokens.format",
    "data.tokenwriter": "data.tokens.writer",
    "data.record": "data.tokens.record",
    "data.lock": "data.tokens.lock",
}


class _Moved(MetaPathFinder, Loader):
    """Finds the old names; asked last, after all that exist."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix("longctx.")
        return ModuleSpec(fullname, self) if fullname != old and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"longctx.{MOVED[spec.name.removeprefix('longctx.')]}"
        warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        self._specs[new] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import system has replaced; the module is not run again."""
        module.__spec__ = self._specs.pop(module.__name__)


def install() -> None:
    """Register the finder of old names with the import system, once."""
    if not any(type(finder).__qualname__ == _Moved.__qualname__ for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


def names_of(package: str, module: str) -> Callable[[str], Any]:
    """Return a package's ``__getattr__``: the names of the module that had its name, now ``module`` within longctx."""

    def get(name: str) -> Any:
        if name.startswith("__") or find_spec(f"{package}.{name}") is not None:  # the latter: import it
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = import_module(f"longctx.{module}")
        value = getattr(home, name)
        warnings.warn(f"{package}.{name} is now {home.__name__}.{name}", DeprecationWarning, stacklevel=2)
        return value

    return get
