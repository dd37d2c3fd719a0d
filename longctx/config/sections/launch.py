"""`launch:` how ranks are started, and on which hosts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import AutoInt, HumanInt, Section, Texts, environment_field

# Passed to the ranks unless the YAML says otherwise: settings of the communication libraries and caches, no secrets.
PASSED_VARIABLES = (
    "CUDA_*",
    "DS_ACCELERATOR",
    "FI_*",
    "GLOO_*",
    "HF_DATASETS_OFFLINE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "NCCL_*",
    "TORCH_*",
    "TOKENIZERS_PARALLELISM",
    "UCX_*",
)


class LaunchSection(Section):
    """One machine or many. All hosts share output.folder; agents read their settings from a job spec there."""

    launcher: Literal["local", "deepspeed", "openmpi", "mpich", "slurm"] = Field(
        "local",
        description="local: this machine; deepspeed: DeepSpeed's launcher on every host, over ssh; openmpi: mpirun; "
        "mpich: mpiexec; slurm: srun",
    )
    hosts: Texts = Field((), description="hosts to run on: a name, or name:ranks, in rank order")
    hostfile: str | None = environment_field(
        None, min_length=1, description="a file that lists the hosts instead, `name slots=ranks` per line"
    )
    ranks_per_host: AutoInt = Field(
        "auto",
        description="ranks on a host whose entry gives no number; auto: one per GPU of this machine, else an equal "
        "share of the ranks",
    )
    interface: str = Field(
        "auto",
        min_length=1,
        max_length=15,
        description="network interface for GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; auto: on each host the one that "
        "reaches the others",
    )
    environment: Texts = Field(
        PASSED_VARIABLES,
        description="names of the environment variables that are passed to the ranks; a trailing * matches any ending",
    )
    folder: str | None = environment_field(
        None, min_length=1, description="working directory on every host; default: that of the command"
    )
    python: str | None = environment_field(
        None, min_length=1, description="Python on every host; default: that of the command"
    )
    ssh_port: HumanInt | None = Field(None, ge=1, le=65535, description="port of the hosts' sshd; default: ssh's own")
    ssh_options: Texts = Field((), description="further ssh options, Name=value; options that run commands are refused")
    options: Texts = Field((), description="further arguments of mpirun, mpiexec or srun, such as --partition=gpu")
    start_seconds: HumanInt = Field(
        120, ge=1, le=86_400, description="seconds within which every host must answer before training starts"
    )
    silence_seconds: HumanInt = Field(
        30, ge=2, le=3600, description="seconds without a message after which a host counts as dead and the job ends"
    )
    frozen_seconds: HumanInt = Field(
        120,
        ge=0,
        le=86_400,
        description="seconds without a heartbeat after which a rank counts as frozen, is reported, and the job ends; "
        "0: never",
    )
    restarts: HumanInt = Field(
        0,
        ge=0,
        le=1000,
        description="how many times to restart after a failure, each time from the newest valid checkpoint",
    )
