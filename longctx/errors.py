"""Errors for users. Their messages say what was given, what is allowed and what to change.

All are ``ValueError``s, so callers can catch them without importing longctx. ``assert`` is for internal invariants.
"""

from __future__ import annotations


class LongctxError(ValueError):
    """Base of all errors that a user can cause and fix."""


class MeshError(LongctxError):
    """The grid of ranks does not fit the world."""


class LayoutError(LongctxError):
    """A sequence cannot be sharded over the ranks as requested."""


class AttentionError(LongctxError):
    """Arguments of an attention operator are inconsistent or not supported."""


class ModelError(LongctxError):
    """A transformers model uses a feature that would be silently wrong on a sharded sequence."""


class DataError(LongctxError):
    """Text, a tokenizer or a token file is empty, damaged or of the wrong kind."""


class ConfigError(LongctxError):
    """A YAML file, an override or a combination of settings is not valid."""


class CheckpointError(LongctxError):
    """A checkpoint is incomplete, damaged, foreign, or cannot be written."""


class EngineError(LongctxError):
    """A DeepSpeed setting or call would be wrong on a sharded sequence."""


class LaunchError(LongctxError):
    """Ranks could not be started, or one of them failed."""


class NonFiniteError(LongctxError):
    """A loss or a gradient is not finite; raised on every rank before weights change."""


class MissingPackageError(LongctxError, ImportError):
    """A required optional package, compiler or header is missing."""
