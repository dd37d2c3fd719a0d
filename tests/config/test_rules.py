"""All rules together: what is legal passes, and a problem points at the line of its key."""

from __future__ import annotations

from config_samples import load_variant, problems_of, text_of, variant

from longctx.config.rules import broken


def test_writing_a_default_out_is_never_a_mistake() -> None:
    load_variant(train__momentum=0.0, zero__stage=0, zero__overlap_comm=False, zero__reduce_scatter=True)


def test_rules_point_at_the_line() -> None:
    text = text_of(variant(train__global_batch=5))
    line = text.splitlines().index("  global_batch: 5") + 1
    problem = problems_of(text).problems[0]
    assert problem.place.line == line and "write 4 or 6" in problem.message


def test_without_a_world_the_rules_about_sizes_are_skipped() -> None:
    config = load_variant(mesh__world=..., mesh__data="auto", train__global_batch=...).config
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"global_batch": 5, "warmup_steps": 999})}
    )
    assert [finding.key for finding in broken(config, 4)] == ["train.warmup_steps", "train.global_batch"]
    assert [finding.key for finding in broken(config, None)] == ["train.warmup_steps"]
