"""The attention function that transformers calls, and what it needs to know of a model."""

from longctx.moved import names_of

__getattr__ = names_of(__name__, "models.hook.attention")
