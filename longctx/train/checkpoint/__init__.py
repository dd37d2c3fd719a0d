"""Save, verify, load, reshard and export the checkpoints of a run."""

from longctx.moved import names_of

__getattr__ = names_of(__name__, "train.checkpoint.checkpointer")
