"""Hundreds of broken configurations: every one is refused, and the message names the right key."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from config_samples import BASE, problems_of, text_of, variant

from longctx.config.keys import leaves, sections


class Mutant(NamedTuple):
    """A broken configuration and the key that a good message names."""

    kind: str
    text: str
    key: str


def without(section: str, key: str) -> dict[str, Any]:
    tree: dict[str, Any] = copy.deepcopy(BASE)
    del tree[section][key]
    return tree


def typos() -> Iterator[Mutant]:
    """Each key with a letter lost, doubled, swapped, replaced, in capitals, and with a dash."""
    for section, block in BASE.items():
        for key, value in block.items():
            middle = len(key) // 2
            wrong = {
                key[:middle] + key[middle + 1 :],
                key[:middle] + key[middle] + key[middle:],
                key[: middle - 1] + key[middle] + key[middle - 1] + key[middle + 1 :],
                key[:middle] + "x" + key[middle + 1 :],
                key.upper(),
                key.replace("_", "-"),
                key + "s",
            } - {key}
            for name in sorted(wrong):
                if f"{section}.{name}" not in leaves():
                    tree = without(section, key)
                    tree.setdefault(section, {})[name] = value
                    yield Mutant("typo", text_of(tree), f"{section}.{key}")


def section_typos() -> Iterator[Mutant]:
    for section, block in BASE.items():
        for name in (section[:-1], section + "s", section[1:], section.capitalize(), section[0] + section):
            tree: dict[str, Any] = copy.deepcopy(BASE)
            del tree[section]
            tree[name] = block
            yield Mutant("section typo", text_of(tree), section)


def wrong_types() -> Iterator[Mutant]:
    for section, block in BASE.items():
        for key in block:
            for value in ({"a": 1}, [[1]], "~surprise~"):
                if value == "~surprise~" and leaves()[f"{section}.{key}"].text_only or key == "sources":
                    continue
                tree: dict[str, Any] = copy.deepcopy(BASE)
                tree[section][key] = value
                yield Mutant("wrong type", text_of(tree), f"{section}.{key}")
    for section in BASE:
        for value in (5, "text", [1, 2]):
            tree = copy.deepcopy(BASE)
            tree[section] = value  # type: ignore[assignment]
            yield Mutant("wrong type", text_of(tree), section)


def wrong_nesting() -> Iterator[Mutant]:
    """Each key at the top, and in another section that has no key of that name."""
    for section, block in BASE.items():
        for key, value in block.items():
            if key not in sections():
                tree = without(section, key)
                tree[key] = value
                yield Mutant("wrong nesting", text_of(tree), f"{section}.{key}")
            other = "train" if section != "train" else "model"
            if f"{other}.{key}" not in leaves():
                tree = without(section, key)
                tree[other][key] = value
                yield Mutant("wrong nesting", text_of(tree), f"{section}.{key}")


def missing() -> Iterator[Mutant]:
    for key, leaf in leaves().items():
        if leaf.required:
            yield Mutant("missing", text_of(without(*key.split("."))), key)
    for key in ("hidden_size", "layers", "heads", "architecture"):
        expected = "model" if key == "architecture" else f"model.{key}"
        yield Mutant("missing", text_of(without("model", key)), expected)
    for section in ("model", "data", "train", "output"):
        tree: dict[str, Any] = copy.deepcopy(BASE)
        del tree[section]
        yield Mutant("missing", text_of(tree), section)


def out_of_range() -> Iterator[Mutant]:
    for key, leaf in leaves().items():
        number = type(leaf.default) in (int, float) or leaf.field.metadata and not leaf.text_only
        if not number or leaf.texts or leaf.raw or leaf.choices or key == "train.betas":
            continue
        section, name = key.split(".")
        for value in (-1, 10**15 if "seed" not in name else 2**64):
            tree: dict[str, Any] = copy.deepcopy(BASE)
            tree.setdefault(section, {})[name] = value
            yield Mutant("out of range", text_of(tree), key)


MUTANTS = [*typos(), *section_typos(), *wrong_types(), *wrong_nesting(), *missing(), *out_of_range()]


def test_there_are_hundreds_of_each_kind_that_matters():
    counts = {kind: sum(mutant.kind == kind for mutant in MUTANTS) for kind in {mutant.kind for mutant in MUTANTS}}
    assert len(MUTANTS) >= 400 and min(counts.values()) >= 10, counts


def test_all_are_refused_briefly_and_name_the_right_key():
    misnamed, lengths = [], []
    for mutant in MUTANTS:
        error = problems_of(mutant.text)
        lengths.append(len(str(error).splitlines()))
        named = any(problem.key == mutant.key or f"{mutant.key!r}" in problem.message for problem in error.problems)
        if not named:
            misnamed.append((mutant.kind, mutant.key, str(error)))
        for problem in error.problems:
            assert problem.code and problem.place.file == "run.yaml" and problem.place.line >= 1
            assert len(str(problem)) < 400 and "Traceback" not in str(problem)
    share = 1 - len(misnamed) / len(MUTANTS)
    assert share >= 0.95, f"{share:.1%} of {len(MUTANTS)} name the right key; not: {misnamed[:20]}"
    assert statistics.median(lengths) <= 3


def test_several_mistakes_are_reported_together_in_the_order_of_the_file():
    tree: dict[str, Any] = copy.deepcopy(BASE)
    tree["model"]["hidden_size"] = "big"
    tree["model"]["layrs"] = tree["model"].pop("layers")
    tree["trian"] = tree.pop("train") | {"lr": -1, "optimizer": "adam"}
    tree["zero"]["stage"] = 7
    tree["outptu"] = {"folder": "x"}
    del tree["output"]
    error = problems_of(text_of(tree))
    assert {problem.key for problem in error.problems} == {
        "model.hidden_size",
        "model.layrs",
        "trian",
        "train.lr",
        "train.optimizer",
        "zero.stage",
        "outptu",
    }
    lines = [problem.place.line for problem in error.problems]
    assert lines == sorted(lines)


def test_the_message_has_place_value_expectation_and_suggestion():
    text = text_of(BASE).replace("optimizer: adamw", "optimizer: adam")
    line = text.splitlines().index("  optimizer: adam") + 1
    assert str(problems_of(text)) == (
        f"run.yaml:{line}:14  train.optimizer: got 'adam'; expected one of adamw, sgd; did you mean 'adamw'?"
        "  [wrong-type]"
    )


def test_parameters_on_nvme_are_refused_with_the_reason_and_what_to_write() -> None:
    (problem,) = problems_of(text_of(variant(zero__stage=3, zero__offload_parameters="nvme"))).problems
    assert problem.key == "zero.offload_parameters" and "NVMe are not supported" in problem.message
    assert problem.message.endswith("use cpu") and "did you mean" not in problem.message
