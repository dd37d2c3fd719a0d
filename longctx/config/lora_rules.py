"""Rules of `model.lora`: a model to adapt, and modules that it has."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator

from longctx.config.findings import Finding, Rule
from longctx.config.problems import show
from longctx.config.schema import RunConfig
from longctx.errors import ModelError
from longctx.models.load.headers import read_weights

_KEY = "model.lora"
ALL_LINEAR = "all-linear"
LORA_FREE = ("dropout", "export")
"""keys that may change when a run resumes"""


def _pretrained(config: RunConfig) -> Iterator[Finding]:
    if config.model.lora is not None and config.model.pretrained is None:
        message = "needs model.pretrained: adapters to frozen random weights train nothing; remove the key, or give one"
        yield Finding(_KEY, message, "model-source")


def _exact_layers(config: RunConfig) -> Iterator[Finding]:
    if config.model.lora is not None and config.attention.layers:
        message = "gives layers new weights, which model.lora would freeze; remove one of the two"
        yield Finding("attention.layers", message, "conflict")


def _all_linear_alone(config: RunConfig) -> Iterator[Finding]:
    lora = config.model.lora
    if lora is not None and ALL_LINEAR in lora.targets and len(lora.targets) > 1:
        message = f"got {show(list(lora.targets))}; {ALL_LINEAR} stands alone: remove it, or the others"
        yield Finding(f"{_KEY}.targets", message, "conflict")


def _no_nvme(config: RunConfig) -> Iterator[Finding]:
    if config.model.lora is not None and config.zero.offload_optimizer == "nvme":
        message = "got 'nvme', but the optimizer state of adapters is small; use none or cpu"
        yield Finding("zero.offload_optimizer", message, "conflict")


def lora_package(config: RunConfig) -> Iterator[Finding]:
    """Yield a finding where adapters are wanted and PEFT is not installed."""
    if config.model.lora is not None and importlib.util.find_spec("peft") is None:
        message = "needs the package peft: pip install 'longctx[peft]', or remove the key to train all weights"
        yield Finding(_KEY, message, "missing-package")


def lora_modules(config: RunConfig) -> Iterator[Finding]:
    """Yield names in `targets` and `modules_to_save` that no module of the pretrained folder ends in."""
    lora, folder = config.model.lora, config.model.pretrained
    if lora is None or folder is None:
        return
    try:
        weights = read_weights(folder)
    except ModelError:
        return  # said of model.pretrained
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    ends = sorted({module.rpartition(".")[2] for module in modules})
    for key, names in (("targets", lora.targets), ("modules_to_save", lora.modules_to_save)):
        known = [*modules, "lm_head"] if key == "modules_to_save" else modules  # a tied one has no weight of its own
        for name in names:
            if name != ALL_LINEAR and not any(module == name or module.endswith(f".{name}") for module in known):
                near = difflib.get_close_matches(name, ends, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"their names end in {', '.join(ends[:12])}"
                message = f"got {show(name)}, and no module of {show(folder)} has that name; {hint}"
                yield Finding(f"{_KEY}.{key}", message, "lora")


RULES: tuple[Rule, ...] = (_pretrained, _exact_layers, _all_linear_alone, _no_nvme)
