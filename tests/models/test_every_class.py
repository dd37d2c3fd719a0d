"""Every causal and masked language model class of transformers is right on a ring, or refused by name.

Right means: loss and every gradient equal those of the eager model, whole, on packed rows (with an id that comes back),
rows padded left and right, and rows with a hole in their mask. The deep suite walks all classes and writes the lists in
docs/models.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models.every_class import class_names
from models.walk import Pair, verdict

import longctx
from longctx.models.attach import attach_attention

from distributed import run_ranks
from tolerances import tolerance

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- classes: begin -->", "<!-- classes: end -->"
SAMPLE = {
    "OPTForCausalLM": "right",
    "RobertaForMaskedLM": "right",
    "Gemma3nForCausalLM": "right",
    "SeedOssForCausalLM": "right",
    "PegasusForCausalLM": "refused",
    "XGLMForCausalLM": "refused",
    "StableLmForCausalLM": "refused",
}


def worker(rank: int, world: int, names: list[str]) -> dict[str, dict[str, str]]:
    mesh = longctx.Mesh(ring=world)
    return {name: verdict(name, mesh) for name in names}


def outcome(kinds: dict[str, str]) -> str:
    """Return what is true of all kinds of rows: "right", "refused", "not run" or, of any, "wrong" or "crash"."""
    found = {kind.split(":")[0] for kind in kinds.values()}
    bad = found & {"wrong", "crash"}
    return bad.pop() if bad else found.pop() if len(found) == 1 else "wrong"


def test_a_few_classes_of_every_kind() -> None:
    for verdicts in run_ranks(2, worker, list(SAMPLE), timeout=240):
        assert {name: outcome(kinds) for name, kinds in verdicts.items()} == SAMPLE, verdicts


def zeros_worker(rank: int, world: int) -> tuple[float, float, str]:
    """Rows whose layout's padding would be token 0, with an embedding of exact zeros, where Gemma 3n takes a root."""
    pair = Pair("Gemma3nForCausalLM", longctx.Mesh(ring=world))
    with torch.no_grad():
        for model in (pair.eager, pair.model):
            model.model.embed_tokens.weight[0] = 0
    attach_attention(pair.model, pair.mesh)
    return pair.errors("packed")


def test_padding_adds_nothing_at_a_singular_point() -> None:
    for loss, gradient, where in run_ranks(2, zeros_worker):
        assert loss <= tolerance("model") and gradient <= tolerance("any model"), where


def test_the_page_lists_every_class_of_this_transformers() -> None:
    text = listed(PAGE.read_text())
    assert f"transformers {transformers.__version__}" in text
    named = re.findall(r"`(\w+)`", text)
    assert sorted(named) == class_names(), "run tests/models/test_every_class.py with -m slow, and commit the page"


def listed(page: str) -> str:
    return page[page.index(BEGIN) + len(BEGIN) : page.index(END)]


def reason(name: str, text: str) -> str:
    """Return the first sentence of a refusal, without the class's own name and the paths of modules."""
    sentence = text.split(": ", 1)[1].removeprefix(f"{name}: ").split(". ")[0].split("; ")[0].split("On a shard")[0]
    for own in (" cannot run on a shard: ", " cannot be sharded: ", ": ", " "):
        sentence = sentence.removeprefix(name + own)
    return re.sub(r" \([\w.]+\)", "", sentence).replace("|", "\\|").replace("`", "").strip().rstrip(".:,")


def is_named(name: str, kinds: dict[str, str]) -> bool:
    """Tell whether a refusal names the class, or a module of its family."""
    family = re.split("For[A-Z]|LMHead|WithLM|Decoder", name)[0]
    return all(family in text for text in kinds.values())


def lists(verdicts: dict[str, dict[str, str]]) -> str:
    """Return the lists of the page in Markdown."""
    groups: dict[str, list[str]] = {"right": [], "refused": [], "not run": []}
    for name in sorted(verdicts):
        groups[outcome(verdicts[name])].append(name)
    lines = [
        f"\ntransformers {transformers.__version__}: {len(groups['right'])} classes right, {len(groups['refused'])} "
        f"refused by name, {len(groups['not run'])} not compared.\n",
        "**Right:** " + ", ".join(f"`{name}`" for name in groups["right"]) + ".\n",
    ]
    for title, group in (("refused", "refused"), ("not compared; judged when a model is attached", "not run")):
        reasons: dict[str, list[str]] = {}
        for name in groups[group]:
            reasons.setdefault(reason(name, next(iter(verdicts[name].values()))), []).append(name)
        lines += [f"| {title} | because |", "|---|---|"]
        lines += [f"| {', '.join(f'`{name}`' for name in names)} | {why} |" for why, names in reasons.items()]
        lines.append("")
    return "\n".join(lines)


@pytest.mark.slow
def test_every_class_is_right_or_refused_by_name() -> None:
    names = class_names()
    verdicts: dict[str, dict[str, str]] = {}
    for part in range(0, len(names), 20):
        verdicts |= run_ranks(2, worker, names[part : part + 20], timeout=600)[0]
    bad: dict[str, Any] = {n: kinds for n, kinds in verdicts.items() if outcome(kinds) in ("wrong", "crash")}
    assert not bad, bad
    unnamed = [n for n, kinds in verdicts.items() if outcome(kinds) == "refused" and not is_named(n, kinds)]
    assert not unnamed, {name: verdicts[name] for name in unnamed}
    page = PAGE.read_text()
    PAGE.write_text(page.replace(BEGIN + listed(page) + END, f"{BEGIN}\n{lists(verdicts)}{END}"))
    assert PAGE.read_text() == page, "the lists in docs/models.md have been written again: look at them and commit them"
