"""The environment variables that are sent to ranks."""

from __future__ import annotations

from launch_samples import config

from longctx.launch.environment import travelling


def test_only_what_is_on_the_list_travels() -> None:
    shell = {"NCCL_DEBUG": "INFO", "HF_TOKEN": "x", "NCCL": "y", "AWS_SECRET": "z", "CUDA_VISIBLE_DEVICES": "3"}
    assert travelling(shell, ("NCCL_*", "CUDA_*")) == {"NCCL_DEBUG": "INFO"}
    assert travelling(shell, ("HF_TOKEN",)) == {"HF_TOKEN": "x"} and travelling(shell, ()) == {}
    defaults = config("{launcher: deepspeed, hosts: [a]}").launch.environment
    assert not any(name in "HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY" for name in travelling(shell, defaults))
