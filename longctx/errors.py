"""The one family of errors meant for users: what was given, what is allowed, what to change.

Everything here is a ``ValueError``, so a caller who knows nothing of longctx can still catch it.
``assert`` is kept for our own invariants.
"""

from __future__ import annotations


class LongctxError(ValueError):
    """Base of every error that a user can cause and mend."""


class MeshError(LongctxError):
    """The grid of ranks does not fit the world."""


class LayoutError(LongctxError):
    """A sequence cannot be laid out over the ranks as asked."""


class AttentionError(LongctxError):
    """Arguments of an attention operator do not fit together, or are not supported."""


class ModelError(LongctxError):
    """A transformers model uses something that a sharded sequence would get silently wrong."""


class DataError(LongctxError):
    """Text, a tokenizer or a token file is empty, damaged or of the wrong kind."""


class ConfigError(LongctxError):
    """A YAML file, an override or a combination of settings is not valid."""


class CheckpointError(LongctxError):
    """A checkpoint is incomplete, damaged, foreign, or cannot be written."""


class EngineError(LongctxError):
    """DeepSpeed was asked for something that a sharded sequence would get wrong."""


class LaunchError(LongctxError):
    """Ranks could not be started, or one of them failed."""


class NonFiniteError(LongctxError):
    """A loss or a gradient is not finite; raised on every rank before weights change."""


class MissingPackageError(LongctxError, ImportError):
    """An optional package, compiler or header is needed and absent."""
