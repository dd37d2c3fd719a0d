"""Checkpoints of a run: saved, verified, loaded, resharded and exported."""

from longctx.moved import names_of

__getattr__ = names_of(__name__, "train.checkpoint.checkpointer")
