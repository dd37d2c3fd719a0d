"""Load a checkpoint, continue a prompt, and report the speed and the size of the cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from longctx.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from longctx.decode.caches.size import cache_bytes
from longctx.decode.cost import CacheChoice, Shape, choose, size
from longctx.errors import ConfigError, LongctxError
from longctx.generation.beams import share_beams, unshare_beams
from longctx.generation.el import disable_el, enable_el
from longctx.generation.generate import generate
from longctx.generation.projections import spec_of, unsupported
from longctx.generation.request import Request
from longctx.generation.stream import TextStream
from longctx.mesh import Mesh
from longctx.models.convert import converted
from longctx.models.hook.bounded_layer import bounded_child
from longctx.models.hook.positions import table_of_positions
from longctx.models.load.pretrained import load_pretrained


class Generated(NamedTuple):
    """One generated text and its figures."""

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    seconds_to_first_token: float | None
    """The prompt's forward included; None for beam search, which returns all at the end."""
    cache_bytes: int
    attention: CacheChoice

    def summary(self, ranks: int) -> str:
        """Return two lines for the terminal."""
        shared = f" on this rank, one of {ranks}" if ranks > 1 else ""
        reading = self.seconds_to_first_token
        after = self.tokens if reading is None else self.tokens - 1
        rate = after / max(self.seconds - (reading or 0.0), 1e-9)
        first = f"the first after {reading:.2f} s" if reading is not None else "reading included"
        return (
            f"{self.prompt_tokens:,} tokens read, {self.tokens:,} written in {self.seconds:.2f} s, {first}: "
            f"{rate:,.1f} tokens/s; cache {size(self.cache_bytes)}{shared}\n"
            f"attention {self.attention.method}: {self.attention.reason}"
        )


class Generator:
    """A loaded checkpoint; the same on every rank of ``mesh``."""

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self.mesh = mesh
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.model: Any = load_pretrained(folder).to(mesh.device).eval()
        # A converted model keeps attn_implementation="longctx", which runs its bounded layers.
        if mesh.sequence_size == 1 and not converted(self.model.config):
            self.model.set_attn_implementation("sdpa" if self.model._supports_sdpa else "eager")

    def answer(self, request: Request, write: Callable[[str], Any]) -> Generated:
        """Continue ``request.prompt`` and write text as it is generated.

        Raises:
            ConfigError: the prompt is too short, prompt and new tokens exceed the model's positions, or transformers
                rejects the combination of options and the folder's generation_config.json.
            ModelError: --attention el for a model that does not support it.
        """
        ids = torch.from_numpy(self.tokenizer.prompt(request.prompt).astype("int64"))[None].to(self.mesh.device)
        least = min(self.mesh.sequence_size, 2)
        if ids.shape[1] < least:
            raise ConfigError(f"generate: the prompt has {ids.shape[1]} tokens, at least {least} are needed; extend it")
        self._check_length(ids.shape[1], request.max_new_tokens)
        attention = self._select_attention(request, ids.shape[1])
        stream = TextStream(self.tokenizer, write) if request.beams == 1 else None
        started = time.perf_counter()
        try:
            made = generate(
                self.model, ids, mesh=self.mesh, layout=request.layout, seed=request.seed, streamer=stream,
                return_dict_in_generate=True, **options_of(request, self.model.generation_config, self.tokenizer),
            )  # fmt: skip
        except LongctxError:
            raise
        except ValueError as error:  # transformers checks options and generation_config.json together
            raise ConfigError(
                f"generate {request.folder}: transformers rejects these options with the folder's "
                f"generation_config.json: {error}"
            ) from error
        seconds = time.perf_counter() - started
        new = made.sequences[0, ids.shape[1] :]
        text = self.tokenizer.decode(new.cpu().numpy())
        if stream is None:
            write(text)
        first = stream.first - started if stream is not None and stream.first is not None else None
        kept = cache_bytes(made.past_key_values)
        return Generated(text, ids.shape[1], len(new), seconds, first, kept, attention)

    def _check_length(self, prompt: int, new: int) -> None:
        """Reject lengths beyond the model's table of positions; the last token is written but not read."""
        rows = table_of_positions(self.model)
        if rows is not None and prompt + new - 1 > rows:
            room = rows - prompt + 1
            fix = f"give --max-new-tokens {room} or less" if room > 0 else "shorten the prompt"
            raise ConfigError(
                f"generate: {prompt:,} tokens of prompt, {new:,} new ones: {type(self.model).__name__} has a table "
                f"of {rows:,} positions; {fix}"
            )

    def _select_attention(self, request: Request, prompt: int) -> CacheChoice:
        """Enable EL-attention or shared beams as requested, or as is cheaper for auto; return the choice."""
        disable_el(self.model)
        unshare_beams(self.model)
        choice = CacheChoice(request.attention, "as asked")
        if request.attention == "auto":
            choice = self._choose(request, prompt)
        if choice.method == "el":
            enable_el(self.model)
        elif request.beams > 1 and self._beams_can_share():
            share_beams(self.model)
        return choice

    def _choose(self, request: Request, prompt: int) -> CacheChoice:
        modules = [module for module in self.model.modules() if spec_of(module) and bounded_child(module) is None]
        if not modules:
            bounded = sum(bounded_child(module) is not None for module in self.model.modules())
            if bounded:
                return CacheChoice(
                    "kv", f"{bounded} of {self.model.config.num_hidden_layers} layers have a bounded state"
                )
            return CacheChoice("kv", str(unsupported(self.model)).split(":")[0])
        ranks = self.mesh.sequence_size
        free = torch.tensor(_free_memory(self.mesh.device) // 2, device=self.mesh.device)
        if ranks > 1:  # the minimum over ranks, so that all choose the same
            dist.all_reduce(free, op=dist.ReduceOp.MIN, group=self.mesh.sequence_group)
        shared = ranks > 1 or self._beams_can_share()
        shape = replace(_shape(self.model, request, prompt), layers=len(modules))
        return choose(shape, memory=int(free) * ranks, shared_prompt=shared)

    def _beams_can_share(self) -> bool:
        """Return whether this process can cache the prompt once for all beams (a ring always does)."""
        config = self.model.config
        odd = converted(config) or getattr(config, "attn_logit_softcapping", None) is not None
        for module in self.model.modules():
            odd |= hasattr(module, "sinks") or hasattr(module, "relative_attention_bias")
        return self.mesh.sequence_size == 1 and not odd and bool(self.model._supports_sdpa)


def options_of(request: Request, generation_config: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the options of transformers' generate() for a request.

    Options that a request does not have (stop tokens, penalties, suppressed tokens) come from the model's
    ``generation_config``.
    """
    sampling = request.temperature > 0 and request.beams == 1
    options: dict[str, Any] = {
        "do_sample": sampling, "num_beams": request.beams, "num_return_sequences": 1,
        "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature if sampling else 1.0,  # transformers warns about settings without effect
        "top_k": request.top_k if sampling else 50, "top_p": request.top_p if sampling else 1.0,
    }  # fmt: skip
    stop = generation_config.eos_token_id
    if generation_config.pad_token_id is None and stop is not None:
        # As transformers does, but without its warning.
        options["pad_token_id"] = stop[0] if isinstance(stop, list) else stop
    if generation_config.stop_strings is not None:
        options["tokenizer"] = tokenizer.transformers
    return options


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
