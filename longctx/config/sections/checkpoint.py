"""`checkpoint:` when to save, how many to keep, whether to resume."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import HumanInt, Section


class CheckpointSection(Section):
    """Checkpoints live in <output.folder>/checkpoints; each is complete and verified, or ignored."""

    every: HumanInt = Field(0, ge=0, le=2**40, description="steps between checkpoints; 0: only after the last step")
    keep: HumanInt = Field(2, ge=1, le=2**20, description="newest checkpoints to keep")
    resume: Literal["auto", "must", "never"] = Field(
        "auto",
        description="auto: resume from the newest valid checkpoint, if there is one; must: refuse to start without "
        "one; never: start from scratch",
    )
