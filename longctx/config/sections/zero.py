"""`zero:` DeepSpeed ZeRO: what is sharded over all ranks, offload, and how gradients are reduced."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import Group, HumanInt, Section, environment_field


class ZeroSection(Section):
    """Optimizer states (1), gradients (2) and parameters (3) sharded over every rank of the mesh."""

    stage: HumanInt = Field(
        3, ge=0, le=3, description="0: nothing sharded; 1: optimizer states; 2: also gradients; 3: also parameters"
    )
    group: Group = Field(
        "none",
        description="size of the groups of neighbouring ranks that each shard a second copy of the weights, so that "
        "backward gathers within the group (stage 3; DeepSpeed's hpZ; docs/zero.md); auto: the ranks of a "
        "host where there are several hosts, else none",
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="cpu: keep optimizer states in host memory (stages 1 to 3); nvme: in zero.nvme_folder (stage 3)",
    )
    offload_parameters: Literal["none", "cpu"] = Field(
        "none", description="cpu: keep parameters in host memory until a layer needs them (stage 3)"
    )
    nvme_folder: str | None = environment_field(
        None, min_length=1, description="folder on every host's NVMe disk, for offload_optimizer: nvme"
    )
    overlap_comm: bool = Field(False, description="reduce gradients during backward (stages 1 to 3)")
    reduce_scatter: bool = Field(True, description="reduce-scatter gradients instead of all-reduce (stages 1 to 3)")
    contiguous_gradients: bool = Field(
        True, description="copy gradients into one contiguous buffer as they are computed (stages 1 to 3)"
    )
