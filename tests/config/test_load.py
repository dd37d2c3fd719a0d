"""Every mistake of a file is reported at once: of syntax, names, types, between keys, of DeepSpeed, of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from config_samples import BASE, problems_of, text_of, variant
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config.load import load, load_for_machine, load_with_sources, loads
from longctx.config.problems import InvalidConfig


class Fault(NamedTuple):
    """One mistake: the key that its message names, and how it gets into a valid file."""

    key: str
    changes: dict[str, Any] = {}
    line: tuple[str, str] = ("", "")
    """a line of the valid file, and what stands in its place"""


FAULTS = [
    Fault("checkpoint.keep", line=("  keep: 2", "  keep: [2")),  # syntax: ends in the next line
    Fault("attention.backend", line=("  backend: aten", "  backend: !!python/name:os.system aten")),
    Fault("zero.overlap_comm", line=("  overlap_comm: false", "\toverlap_comm: false")),  # a tab
    Fault("data.packing", line=("  packing: concat", "  packing: concat\n  packing: best_fit")),
    Fault("train.micro_batch", line=("  micro_batch: 1", "  micro_batch: 01")),
    Fault("train.lgo_every", {"train__lgo_every": 5}),
    Fault("outptu", line=("output:", "outptu:")),
    Fault("model.dtype", {"model__dtype": "fp64"}),
    Fault("zero.stage", {"zero__stage": 7}),
    Fault("data.held_out", {"data__held_out": "few"}),
    Fault("output.tensorboard", {"output__tensorboard": "on"}),
    Fault("model.kv_heads", {"model__kv_heads": 3}),
    Fault("train.warmup_steps", {"train__warmup_steps": 1000}),
    Fault("train.betas", {"train__betas": [0.9, 1.0]}),
    Fault("memory.offload_checkpoints", {"memory__offload_checkpoints": True}),
    Fault("attention.layers", {"attention__layers": {"0": "abd"}}),
    Fault("launch.interface", {"launch__interface": "not a name"}),
    Fault("launch.environment", {"launch__environment": ["A B"]}),
    Fault("mesh.ring", {"mesh__ring": 3}),
    Fault("deepspeed.wall_clock_breakdwon", {"deepspeed__wall_clock_breakdwon": True}),
    Fault("model.extra.api_key", {"model__extra": {"api_key": "x"}}),
    Fault("data.sources", {"data__sources": ["no/such/file.txt"]}),
]


def faulty(faults: list[Fault]) -> str:
    """Return a valid file with these mistakes made in it."""
    text = text_of(variant(**{key: value for fault in faults for key, value in fault.changes.items()}))
    for old, new in (fault.line for fault in faults if fault.line[0]):
        assert f"\n{old}\n" in text
        text = text.replace(f"\n{old}\n", f"\n{new}\n")
    return text


def found_in(text: str, path: Path) -> InvalidConfig:
    path.write_text(text)
    with pytest.raises(InvalidConfig) as caught:
        load_for_machine(path)
    return caught.value


def test_seven_mistakes_of_seven_kinds_are_seven_problems(tmp_path: Path) -> None:
    keys = ("checkpoint.keep", "train.lgo_every", "model.dtype", "model.kv_heads", "mesh.ring", "data.sources")
    faults = [fault for fault in FAULTS if fault.key in (*keys, "deepspeed.wall_clock_breakdwon")]
    error = found_in(faulty(faults), tmp_path / "run.yaml")
    assert sorted(problem.key for problem in error.problems) == sorted(fault.key for fault in faults)
    assert len({problem.code for problem in error.problems}) == len(faults) == 7
    lines = [problem.place.line for problem in error.problems]
    assert lines == sorted(lines) and all(lines)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(faults=st.lists(st.sampled_from(FAULTS), min_size=1, unique_by=lambda fault: fault.key))
def test_any_independent_mistakes_are_found_together(faults: list[Fault], tmp_path_factory: pytest.TempPathFactory):
    error = found_in(faulty(faults), tmp_path_factory.getbasetemp() / "faulty.yaml")
    assert sorted(problem.key for problem in error.problems) == sorted(fault.key for fault in faults), str(error)


def test_a_wrong_value_silences_only_the_rules_that_read_it() -> None:
    wrong = variant(train__steps="many", train__warmup_steps=1000, train__momentum=0.9, train__global_batch=5)
    keys = [problem.key for problem in problems_of(text_of(wrong)).problems]
    assert keys == ["train.steps", "train.global_batch", "train.momentum"], "warmup_steps has nothing to be below"


def test_each_entry_of_a_list_is_judged() -> None:
    layers = {"0": "abd", "x": "ring", "0-90": "abc", "1": {"abc": {"slot": 3}}}
    hosts = {"launch__launcher": "deepspeed", "launch__hosts": ["-a", "b:0", "c"]}
    error = problems_of(text_of(variant(attention__layers=layers, **hosts)))
    found = [problem.message for problem in error.problems if problem.key == "attention.layers"]
    assert len(found) == 4 and all(any(repr(key) in message for message in found) for key in layers)
    assert sum(problem.key == "launch.hosts" for problem in error.problems) == 2


def test_an_address_is_one_problem_and_hides_no_missing_file(tmp_path: Path) -> None:
    sources = ["https://example.com/x", "no/such/file.txt"]
    error = found_in(text_of(variant(data__sources=sources, model__extra={"_name": 1})), tmp_path / "run.yaml")
    assert [problem.code for problem in error.problems] == ["refused", "url", "no-file"]


def test_overrides_are_judged_with_the_file() -> None:
    error = problems_of(text_of(variant(zero__stage=7)), "train.clip=-1", "train.lr=[1", "trian.lr=2")
    assert [problem.key for problem in error.problems] == ["zero.stage", "train.lr", "", "train.clip"]


def test_the_world_of_hosts_is_only_asked_for_where_it_decides() -> None:
    def default_world(config: Any) -> int:
        raise AssertionError("mesh.world says it")

    loads(text_of(BASE), default_world=default_world)
    error = problems_of(text_of(variant(launch__launcher="rsh", train__global_batch=5)))
    assert [problem.key for problem in error.problems] == ["train.global_batch", "launch.launcher"]


def test_a_valid_file_is_loaded_with_its_sources(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text_of(BASE))
    loaded = load_with_sources(path, ["train.lr=0.5"])
    assert loaded.config == load(path, ["train.lr=0.5"]) and loaded.config.train.lr == 0.5
    assert str(loaded.sources["train.lr"]) == "override train.lr" and "train.seed" not in loaded.sources
    assert str(loaded.sources["model.layers"]) == f"{path}:4:11"
