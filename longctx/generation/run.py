"""Load a checkpoint, continue a prompt, and say how fast it was and what it kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longctx.data.tokenizer import Tokenizer, load_tokenizer
from longctx.decode.caches.size import cache_bytes
from longctx.decode.cost import Shape, choose
from longctx.errors import ConfigError, ModelError
from longctx.generation.request import Request
from longctx.generation.stream import TextStream
from longctx.mesh import Mesh
from longctx.models.convert import converted
from longctx.models.el import disable_el, enable_el
from longctx.models.generate import generate
from longctx.models.pretrained import load_pretrained
from longctx.models.projections import family_of


class Generated(NamedTuple):
    """One answer and its figures."""

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    cache_bytes: int
    attention: str

    def summary(self, ranks: int) -> str:
        """One line for the terminal."""
        shared = f" on this rank, one of {ranks}" if ranks > 1 else ""
        return (
            f"{self.prompt_tokens:,} tokens read, {self.tokens:,} written in {self.seconds:.1f} s "
            f"({self.tokens / max(self.seconds, 1e-9):.1f} tokens/s, reading included), attention {self.attention}, "
            f"cache {self.cache_bytes / 2**20:,.1f} MiB{shared}"
        )


class Generator:
    """A loaded checkpoint; the same on every rank of ``mesh``."""

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self.mesh = mesh
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.model: Any = load_pretrained(folder).to(mesh.device).eval()
        self.model.config.use_cache = True
        if mesh.sequence_size == 1 and not converted(self.model.config):  # bounded memories are longctx's to compute
            self.model.set_attn_implementation("sdpa" if self.model._supports_sdpa else "eager")

    def answer(self, request: Request, write: Callable[[str], Any]) -> Generated:
        """Continue ``request.prompt`` and write text as it is made.

        Raises:
            ConfigError: the prompt is too short.
            ModelError: --attention el on a model or a ring that cannot.
        """
        ids = torch.from_numpy(self.tokenizer.encode(request.prompt).astype("int64"))[None].to(self.mesh.device)
        if ids.shape[1] < 2:
            raise ConfigError("generate: the prompt has less than two tokens; give a longer one")
        attention = self._attend(request, ids.shape[1])
        stream = TextStream(self.tokenizer, write) if request.beams == 1 else None
        sampling = request.temperature > 0 and request.beams == 1
        options: dict[str, Any] = {"do_sample": sampling, "num_beams": request.beams, "streamer": stream}
        if sampling:
            options |= {"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p}
        end = self.tokenizer.end_of_document
        started = time.perf_counter()
        made = generate(
            self.model, ids, mesh=self.mesh, layout=request.layout, seed=request.seed,
            max_new_tokens=request.max_new_tokens, eos_token_id=end, pad_token_id=end or 0,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        new = made.sequences[0, ids.shape[1] :]
        text = self.tokenizer.decode(new.cpu().numpy())
        if stream is None:
            write(text)
        kept = cache_bytes(made.past_key_values)
        return Generated(text, ids.shape[1], len(new), seconds, kept, attention)

    def _attend(self, request: Request, prompt: int) -> str:
        """Set the model up for the asked, or the cheaper, kind of attention, and return its name."""
        if self.mesh.sequence_size > 1:
            if request.attention == "el":
                raise ModelError("generate --attention el: hidden states are not sharded yet; use kv on a ring")
            return "kv"
        disable_el(self.model)
        kind = request.attention
        if kind == "auto":
            known = any(family_of(module) for module in self.model.modules())
            shape = _shape(self.model, request, prompt)
            kind = choose(shape, memory=_free_memory(self.mesh.device) // 2) if known else "kv"
        if kind == "el":
            enable_el(self.model)
        return kind


def _shape(model: Any, request: Request, prompt: int) -> Shape:
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size
    return Shape(
        layers=config.num_hidden_layers, heads=heads, key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or width // heads, width=width, batch=1, beams=request.beams,
        prompt=prompt, generated=request.max_new_tokens, element_bytes=model.dtype.itemsize,
    )  # fmt: skip


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
