"""Named machines: memory, peak rates and links of their devices, with the fractions of them that are reached in
practice.

Sources are in the comment above `MACHINES`; docs/plan.md says what has been verified."""

from __future__ import annotations

from dataclasses import dataclass, replace

from longctx.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A node's devices and links. Bandwidths are bytes/s per device in one direction, latencies are seconds."""

    name: str
    memory: int
    """bytes per device (data sheet)"""
    peak: float
    """dense bf16 FLOP/s (data sheet)"""
    bandwidth: float
    """of the device's memory (data sheet)"""
    matmul: float
    """fraction of the peak that a transformer's matrix products reach"""
    attention: float
    """fraction of the peak that a fused kernel reaches on a long causal attention forward"""
    attention_backward: float
    link: float
    """achieved bandwidth of one message between devices of a node"""
    network: float
    """achieved bandwidth of one message between nodes"""
    latency: float = 8e-6
    network_latency: float = 15e-6
    per_node: int = 8
    host: int = 2048 * GIB
    """bytes of a node's host memory: a usual size, not a property of the device"""
    host_link: float = 25e9
    reserved: int = 3 * GIB
    """bytes per device for the driver, NCCL's buffers and allocator fragmentation"""

    @property
    def usable(self) -> int:
        """Bytes per device that a run can use."""
        return self.memory - self.reserved


# Peaks and memories: NVIDIA's data sheets of A100 80GB SXM, H100 SXM5, H200 SXM, HGX B200 (dense bf16, no sparsity);
# AMD's of MI300X. Links: NVLink 3 300 GB/s, NVLink 4 450, NVLink 5 900, Infinity Fabric 448 per direction; a large
# message reaches about 0.85 to 0.9 of it (H100: 400 of 450). Networks: 200 Gb/s per device for A100 nodes, 400 for the
# others; messages reach 0.9 of it. Attention, as fractions of the peak: H100 FlashAttention-3 680 forward and 586
# TFLOP/s backward at 32K causal (MagiAttention's comparison); A100 FlashAttention-2 about 0.65 and 0.55 (its paper);
# B200 FlashAttention-4 1418 and 1209 (its repository); MI300X is estimated. Matrix products: 0.75 of the peak of H100
# and H200 (769 to 798 TFLOP/s measured on random bf16 on an H200); the others likewise, MI300X about 0.55.
_SXM = Machine("h100", 80 * GIB, 989e12, 3.35e12, 0.75, 0.65, 0.55, 400e9, 45e9)
MACHINES = {
    "a100": Machine("a100", 80 * GIB, 312e12, 2.04e12, 0.75, 0.62, 0.54, 255e9, 22.5e9),
    "h100": _SXM,
    "h200": replace(_SXM, name="h200", memory=141 * 10**9, bandwidth=4.8e12, attention=0.63, attention_backward=0.56),
    "b200": Machine("b200", 180 * GIB, 2250e12, 8e12, 0.72, 0.62, 0.53, 800e9, 45e9),
    "mi300x": Machine("mi300x", 192 * GIB, 1307e12, 5.3e12, 0.55, 0.40, 0.30, 340e9, 45e9, latency=15e-6),
    # A core of a virtual machine (Zen 5, AVX-512): fp32 products 88 GFLOP/s, torch's attention 60; gloo over loopback.
    "cpu": Machine(
        "cpu", 12 * GIB, 88e9, 36e9, 0.85, 0.68, 0.68, 1.5e9, 1e9, 1e-4, 1e-3, per_node=2, host=24 * GIB, reserved=GIB
    ),
}


def machine_named(name: str) -> Machine:
    """Return the machine of that name.

    Raises:
        ConfigError: there is no such machine.
    """
    found = MACHINES.get(name.lower().replace("-", ""))
    if found is None:
        raise ConfigError(f"plan --machine {name}: unknown; choose one of {', '.join(MACHINES)}")
    return found
