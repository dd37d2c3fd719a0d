"""Machines by name: what a device holds and does, and what joins them. Makers' figures, and shares of them that are
reached in practice (docs/plan.md says where each share comes from and how far it can be trusted)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from longctx.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A node's devices and links. Bandwidths in bytes/s and device, in one direction; latencies in seconds."""

    name: str
    memory: int
    """bytes of a device, by the maker"""
    peak: float
    """dense bf16 FLOP/s, by the maker"""
    bandwidth: float
    """of the device's memory, bytes/s, by the maker"""
    matmul: float
    """share of the peak that a transformer's products reach"""
    attention: float
    """share of the peak that a long causal attention forward reaches with a fused kernel"""
    attention_backward: float
    link: float
    """between devices of a node, as one message reaches it"""
    network: float
    """between nodes, a device's share, as one message reaches it"""
    latency: float = 8e-6
    network_latency: float = 15e-6
    per_node: int = 8
    host: int = 2048 * GIB
    """memory of a node's host, bytes; a usual size, not a property of the device"""
    host_link: float = 25e9
    reserved: int = 3 * GIB
    """what the driver, NCCL's buffers and the allocator's gaps take of a device"""

    @property
    def usable(self) -> int:
        """Bytes of a device that a run may plan with."""
        return self.memory - self.reserved


# Peaks and memories: NVIDIA's data sheets of A100 80GB SXM, H100 SXM5, H200 SXM, HGX B200 (dense bf16, no sparsity);
# AMD's of MI300X. Links: NVLink 3 300 GB/s, NVLink 4 450, NVLink 5 900, Infinity Fabric 448 a direction; a large
# message reaches about 0.85 to 0.9 of it (H100: 400 of 450). Networks: 200 Gb/s a device for A100 nodes, 400 for the
# others, 0.9 of it reached. Attention, as shares of the peak: H100 FlashAttention-3 680 forward and 586 TFLOP/s
# backward at 32K causal (MagiAttention's comparison); A100 FlashAttention-2 about 0.65 and 0.55 (its paper); B200
# FlashAttention-4 1418 and 1209 (its repository); MI300X at the share of A100, not measured. Products: 0.75 of H100's
# and H200's peak (769 to 798 TFLOP/s measured on random bf16 on an H200); the others likewise, MI300X about 0.55.
_SXM = Machine("h100", 80 * GIB, 989e12, 3.35e12, 0.75, 0.65, 0.55, 400e9, 45e9)
MACHINES = {
    "a100": Machine("a100", 80 * GIB, 312e12, 2.04e12, 0.75, 0.62, 0.54, 255e9, 22.5e9),
    "h100": _SXM,
    "h200": replace(_SXM, name="h200", memory=141 * 10**9, bandwidth=4.8e12, attention=0.63, attention_backward=0.56),
    "b200": Machine("b200", 180 * GIB, 2250e12, 8e12, 0.72, 0.62, 0.53, 800e9, 45e9),
    "mi300x": Machine("mi300x", 192 * GIB, 1307e12, 5.3e12, 0.55, 0.40, 0.30, 340e9, 45e9, latency=15e-6),
    # A virtual machine's core (Zen 5, AVX-512): fp32 products 88 GFLOP/s, torch's attention 60; gloo over loopback.
    "cpu": Machine(
        "cpu", 12 * GIB, 88e9, 36e9, 0.85, 0.68, 0.68, 1.5e9, 1e9, 1e-4, 1e-3, per_node=2, host=24 * GIB, reserved=GIB
    ),
}


def machine_named(name: str) -> Machine:
    """Return a machine by its name.

    Raises:
        ConfigError: no such machine.
    """
    found = MACHINES.get(name.lower().replace("-", ""))
    if found is None:
        raise ConfigError(f"plan --machine {name}: unknown; choose one of {', '.join(MACHINES)}")
    return found
