"""README.md of an exported model: what it was trained from and on, for how long a context, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longctx import __version__
from longctx.config.schema import RunConfig
from longctx.config.stages import stages_of
from longctx.train.checkpoint.manifest import Progress

_WHOLE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
"""
_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{folder}")
"""


def model_card(config: RunConfig, description: Any, progress: Progress) -> str:
    """Return the text of a run's model card.

    Args:
        description: the transformers config of the model.
        progress: of the run when the model was exported.
    """
    model, lora = config.model, config.model.lora
    adapter = lora is not None and lora.export == "adapter"
    base = Path(model.pretrained).name if model.pretrained else None
    start = f"`{base}`" if base else f"random weights ({model.architecture})"
    how = f" with LoRA adapters of rank {lora.rank}{'' if adapter else ', merged here'}" if lora else ""
    lines = ["---", f"library_name: {'peft' if adapter else 'transformers'}", "tags: [longctx]", "---", ""]
    lines += [f"# {Path(config.output.folder).name}", ""]
    lines += [
        f"Trained from {start}{how} by longctx {__version__}: {progress.step:,} steps, {progress.tokens:,} tokens."
    ]
    lines += ["", "| | |", "|---|---|", f"| text | {', '.join(_name(source) for source in config.data.sources)} |"]
    lines += [f"| rows | {_rows(config, progress.step)} |", f"| positions | {_positions(description)} |"]
    code = (_ADAPTER if adapter else _WHOLE).format(folder="path/to/this/folder", base=base)
    return "\n".join([*lines, "", "```python", code.rstrip(), "```", ""])


def _name(source: str) -> str:
    """Return a source without the folders of the machine that it was read on."""
    return f"`{source if source.startswith('hf:') else Path(source).name}`"


def _rows(config: RunConfig, step: int) -> str:
    done = [stage for stage in stages_of(config) if stage.first <= max(step, 1)]
    parts = [f"{stage.config.data.sequence_length:,} tokens (from step {stage.first:,})" for stage in done]
    return f"{done[0].config.data.sequence_length:,} tokens" if len(parts) == 1 else ", ".join(parts)


def _positions(description: Any) -> str:
    positions, rope = (
        getattr(description, "max_position_embeddings", None),
        getattr(description, "rope_parameters", None),
    )
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    return f"{positions:,}{f' (RoPE: {kind})' if kind else ''}" if isinstance(positions, int) else "not bounded"
