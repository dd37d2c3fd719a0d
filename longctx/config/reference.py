"""The reference of all keys, as Markdown: ``python -m longctx.config.reference > configs/README.md``."""

from __future__ import annotations

from longctx.config.fields import environment_ok
from longctx.config.keys import Leaf, expected, leaves, sections
from longctx.config.presets import PRESETS
from longctx.config.strict_yaml import MAX_BYTES, MAX_DEPTH, MAX_NODES
from longctx.config.write import scalar

_HEAD = """# Configurations

A run is one YAML file: `longctx train FILE [section.key=value …]`. Files are named
model_length_parallelism_hardware. `longctx check FILE` finds every mistake at once, `longctx explain FILE` says what
each key means and where its value came from, `longctx explain` alone shows all keys with their defaults. `longctx init`
writes a commented file to start from, `longctx init --full` one with every key.

This page is generated from the schema (`python -m longctx.config.reference > configs/README.md`).

## Files

| file | use |
|---|---|
| `quickstart.yaml` | a small model on this Python's own source code, a few minutes on two cores |
| `smoke.yaml` | the same in under a minute |
"""

_READING = f"""
## How values are read

- YAML 1.2, strictly: `1e-4` is a number; only `true` and `false` are booleans (`on`, `no` and `22:22` are text);
  numbers with a leading zero, duplicate keys, tags (`!…`) and merge keys (`<<`) are errors.
- Whole numbers may be written `1_000`, `10k` (thousand), `3M`, `2G`, `8Ki` (1024), `1Mi`, `1Gi`.
- Paths are relative to the folder in which the command runs; `~/` is your home. `${{env:NAME}}` is read in the keys
  marked with *env* and nowhere else: a configuration is saved with its run, so nothing secret belongs in it.
- A file has at most {MAX_BYTES // 1024} KiB, {MAX_DEPTH} levels, and {MAX_NODES} values with aliases expanded.
- `section.key=value` on the command line is stronger than the file, and its value is read by the same rules.
"""


def reference() -> str:
    """Return the text of ``configs/README.md``."""
    files = (f"| `{p.file}` | {' '.join(p.about.split())} (`init --preset {name}`) |" for name, p in PRESETS.items())
    lines = [_HEAD + "\n".join(files)]
    lines += [_READING, "## Keys"]
    for name, kind in sections().items():
        lines += ["", f"### {name}", "", " ".join((kind.__doc__ or "").split()), ""]
        lines += ["| key | default | accepts | meaning |", "|---|---|---|---|"]
        for key, leaf in leaves().items():
            if key.startswith(f"{name}."):
                default = "**required**" if leaf.required else f"`{scalar(leaf.default)}`"
                accepts = _accepts(leaf) + (" *env*" if environment_ok(leaf.field) else "")
                lines.append(f"| `{key.rpartition('.')[2]}` | {default} | {accepts} | {_cell(leaf.meaning)} |")
        for key, leaf in leaves().items():
            if key.startswith(f"{name}."):
                lines += _block(leaf)
    return "\n".join([*lines, "", "### deepspeed", "", leaves()["deepspeed"].meaning, ""])


def _accepts(leaf: Leaf) -> str:
    if leaf.block is None:
        return expected(leaf)
    return "a list of blocks, below" if leaf.listed else "a block of keys, below, or null"


def _block(leaf: Leaf) -> list[str]:
    """Return the table of a block's keys, [] for a plain value."""
    if leaf.block is None:
        return []
    title = leaf.key + ("[]" if leaf.listed else "")
    lines = ["", f"#### {title}", "", " ".join((leaf.block.__doc__ or "").split()), ""]
    lines += ["| key | accepts | meaning |", "|---|---|---|"]
    for name, inner in leaf.inner.items():
        required = "**required**, " if inner.required else ""
        lines.append(f"| `{name}` | {required}{expected(inner)} | {_cell(inner.meaning)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
