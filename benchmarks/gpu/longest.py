"""`python -m benchmarks.gpu.longest`: bytes per token at Llama-3-8B's widths on one GPU, rung by rung.

ALST's ablation ladder on longctx and on DeepSpeed's parts: forward and backward of a model of two layers in bf16 at
growing lengths, the allocator's peak at each, the bytes per additional token, and the length at which the card would be
full. Beside it the bytes that `longctx plan` predicts. `--tiny` runs the same code on a CPU at tiny widths.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware
from benchmarks.gpu.figures import find_device
from benchmarks.harness import RESULTS as FOLDER
from benchmarks.harness import write_csv
from benchmarks.measure import peak_bytes
from benchmarks.peers import deepspeed_alst
from longctx.engine.activations import ActivationSettings, apply_settings
from longctx.plan.memory import step_bytes
from longctx.plan.setup import Setup, resolve_loss_tile, resolve_mlp_tile
from longctx.plan.shape import ModelShape

RESULTS = FOLDER / "longest_gpu.csv"
WIDTHS = ModelShape(hidden=4096, layers=2, heads=32, kv_heads=8, head_dim=128, inner=14_336, vocab=128_256)
LENGTHS = (16_384, 32_768, 65_536, 131_072)
TINY = replace(WIDTHS, hidden=64, heads=4, kv_heads=2, head_dim=16, inner=192, vocab=8192)
TINY_LENGTHS = (1024, 2048)

OURS = {
    "longctx, checkpoints": ActivationSettings(recompute="layer"),
    "longctx + tiled loss": ActivationSettings(recompute="layer", loss_tile="auto"),
    "longctx + checkpoints on the host": ActivationSettings(
        recompute="layer", loss_tile="auto", offload_checkpoints=True
    ),
    "longctx + tiled MLP": ActivationSettings(
        recompute="layer", loss_tile="auto", offload_checkpoints=True, mlp_tile="auto"
    ),
    "longctx + attention kept": ActivationSettings(
        recompute="layer_keep_attention", loss_tile="auto", offload_checkpoints=True, mlp_tile="auto"
    ),
    "longctx + norms recomputed": ActivationSettings(
        recompute="layer_keep_attention", loss_tile="auto", offload_checkpoints=True, mlp_tile="auto",
        recompute_norms=True,
    ),
}  # fmt: skip
THEIRS = {
    "checkpoints": {"loss": False, "host": False, "mlp": False},
    "ALST + tiled loss": {"loss": True, "host": False, "mlp": False},
    "ALST + checkpoints on the host": {"loss": True, "host": True, "mlp": False},
    "ALST + tiled MLP": {"loss": True, "host": True, "mlp": True},
}
Step = Callable[[torch.Tensor], None]


def make_model(shape: ModelShape, device: torch.device, attention: str) -> Any:
    """Build a Llama of these widths in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2**24, attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).train()


def ours(shape: ModelShape, device: torch.device, memory: ActivationSettings) -> Step:
    import longctx

    longctx.register()
    model = make_model(shape, device, "longctx")
    apply_settings(model, memory)

    def step(ids: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    return step


def theirs(shape: ModelShape, device: torch.device, *, loss: bool, host: bool, mlp: bool) -> Step:
    model = make_model(shape, device, "sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if mlp:
        for layer in model.model.layers:
            deepspeed_alst.tile_mlp(layer.mlp)
    compute = deepspeed_alst.tiled_loss if loss else deepspeed_alst.whole_loss

    def step(ids: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        labels = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        saved = torch.autograd.graph.save_on_cpu(pin_memory=ids.is_cuda) if host else nullcontext()
        with saved:
            total = compute(model, 1, input_ids=ids, position_ids=positions, labels=labels, tokens=ids.shape[1])
        total.backward()

    return step


def peak_of(step: Step, length: int, vocabulary: int, device: torch.device) -> int | None:
    """Return the peak bytes of a step (on a CPU: beyond what was allocated before); None if the device is too small."""
    ids = torch.randint(vocabulary, (1, length), device=device)
    gc.collect()
    if device.type != "cuda":
        return peak_bytes(lambda: step(ids))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        step(ids)
    except torch.cuda.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(device)


def planned(shape: ModelShape, memory: ActivationSettings, lengths: tuple[int, int], on_gpu: bool) -> float:
    """Return the planner's bytes per additional token between two lengths."""
    setup = Setup(
        0, stage=0, recompute=memory.recompute, offload_checkpoints=memory.offload_checkpoints and on_gpu, states=0,
        loss_tile=resolve_loss_tile(memory.loss_tile, shape, on_gpu), mlp_tile=resolve_mlp_tile(memory.mlp_tile, shape),
        recompute_norms=memory.recompute_norms, on_gpu=on_gpu,
    )  # fmt: skip
    short, long = (step_bytes(shape, replace(setup, tokens=tokens)).peak.total for tokens in lengths)
    return (long - short) / (lengths[1] - lengths[0])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.longest", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny widths on a CPU; no file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    device = find_device(chosen.tiny, "--tiny")
    if device is None:
        return 2
    shape, lengths = (TINY, TINY_LENGTHS) if chosen.tiny else (WIDTHS, LENGTHS)
    chip = hardware.describe() if chosen.tiny else torch.cuda.get_device_name()
    room = 0 if chosen.tiny else torch.cuda.get_device_properties(device).total_memory
    print(f"{chip}; torch {torch.__version__}; commit {hardware.commit()}")
    rows = []
    for name in (*THEIRS, *OURS):
        step = ours(shape, device, OURS[name]) if name in OURS else theirs(shape, device, **THEIRS[name])
        step(torch.randint(shape.vocab, (1, 256), device=device))  # warm up: process groups, autotuning, caches
        peaks = {length: peak_of(step, length, shape.vocab, device) for length in lengths}
        del step
        rows.append(_row(name, shape, {length: peak for length, peak in peaks.items() if peak is not None}, room))
        print("  " + "  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if not chosen.tiny:
        more = {"chip": chip, "torch": torch.__version__, "commit": hardware.commit()}
        write_csv(chosen.output, [row | more for row in rows])
    return 0


def _row(name: str, shape: ModelShape, peaks: dict[int, int], room: int) -> dict[str, Any]:
    """Return the bytes per additional token between the two longest that fit, and the length that fills the card."""
    row: dict[str, Any] = {"contestant": name, "layers": shape.layers, "tokens": max(peaks, default=0)}
    row |= {"peak_bytes": max(peaks.values(), default=0), "bytes_a_token": "", "full_at_tokens": "", "planned": ""}
    if len(peaks) < 2:
        return row
    short, long = sorted(peaks)[-2:]
    slope = (peaks[long] - peaks[short]) / (long - short)
    row["bytes_a_token"] = round(slope)
    if room:
        row["full_at_tokens"] = long + int((room - peaks[long]) / slope)
    if name in OURS:
        row["planned"] = round(planned(shape, OURS[name], (short, long), on_gpu=room > 0))
    return row


if __name__ == "__main__":
    raise SystemExit(main())
