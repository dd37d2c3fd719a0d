"""`launch:` how ranks are started, and on which hosts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longctx.config.fields import AutoInt, HumanInt, Section, Texts, environment_field

# What travels unless the YAML says otherwise: settings of the communication libraries and caches, nothing secret.
TRAVELLING = (
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
    """One machine or many. Hosts share output.folder; values travel by a private file there, never as arguments."""

    launcher: Literal["local", "deepspeed", "openmpi", "mpich", "slurm"] = Field(
        "local",
        description="local: this machine; deepspeed: DeepSpeed's launcher on every host, over ssh; openmpi: mpirun; "
        "mpich: mpiexec; slurm: srun",
    )
    hosts: Texts = Field((), description="where ranks run: a name, or name:ranks, in the order of the ranks")
    hostfile: str | None = environment_field(
        None, min_length=1, description="a file with the hosts instead, a line each: `name slots=ranks`"
    )
    ranks_per_host: AutoInt = Field(
        "auto",
        description="ranks on a host that does not say so itself; auto: one per GPU of this machine, else an equal "
        "share of the ranks",
    )
    interface: str = Field(
        "auto",
        min_length=1,
        max_length=15,
        description="network interface of GLOO_ and NCCL_SOCKET_IFNAME; auto: on each host the one towards the others",
    )
    environment: Texts = Field(
        TRAVELLING, description="names of the environment variables that travel to the ranks; a last * is any ending"
    )
    folder: str | None = environment_field(
        None, min_length=1, description="working directory on every host; default: the one the command runs in"
    )
    python: str | None = environment_field(
        None, min_length=1, description="Python on every host; default: the one the command runs with"
    )
    ssh_port: HumanInt | None = Field(None, ge=1, le=65535, description="port of the hosts' sshd; default: ssh's own")
    ssh_options: Texts = Field((), description="further ssh options, Name=value; those that run commands are refused")
    options: Texts = Field((), description="further arguments of mpirun, mpiexec or srun, such as --partition=gpu")
    start_seconds: HumanInt = Field(
        120, ge=1, le=86_400, description="how long every host has to answer before anything is trained"
    )
    silence_seconds: HumanInt = Field(
        30, ge=2, le=3600, description="a host that is silent for so long counts as dead, and the job ends"
    )
    frozen_seconds: HumanInt = Field(
        120,
        ge=0,
        le=86_400,
        description="a rank whose process makes no sign of life for so long is named and the job ends; 0: never",
    )
    restarts: HumanInt = Field(
        0, ge=0, le=1000, description="after a failure, how many times to start again from the newest valid checkpoint"
    )
