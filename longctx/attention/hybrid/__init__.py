"""Ulysses within a group of ranks, ring attention across the groups."""

from longctx.moved import names_of

__getattr__ = names_of(__name__, "attention.hybrid.operator")
