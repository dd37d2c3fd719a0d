"""Cottention: attention by cosine similarity with a state of constant size."""

from longctx.moved import names_of

__getattr__ = names_of(__name__, "bounded.cosine.operator")
