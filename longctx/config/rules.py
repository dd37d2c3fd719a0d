"""All rules between keys. They run before any process starts, and every violation is reported."""

from __future__ import annotations

from longctx.config import (
    attention_rules,
    data_rules,
    launch_rules,
    layer_rules,
    lora_rules,
    mesh_rules,
    model_rules,
    rope_rules,
    stages,
    train_rules,
    zero_rules,
)
from longctx.config.findings import Finding, Rule
from longctx.config.schema import RunConfig

_RULES: tuple[Rule, ...] = (
    *model_rules.RULES,
    *rope_rules.RULES,
    *lora_rules.RULES,
    *stages.RULES,
    *attention_rules.RULES,
    *layer_rules.RULES,
    *data_rules.RULES,
    *train_rules.RULES,
    *zero_rules.RULES,
    *launch_rules.RULES,
)


def broken(config: RunConfig, world: int | None) -> list[Finding]:
    """Return the findings of all rules in a world of ``world`` ranks (None: unknown; rules about sizes are skipped)."""
    sizes = [] if world is None else mesh_rules.rules_of(world)
    return stages.judge_run([*_RULES, *sizes], config)
