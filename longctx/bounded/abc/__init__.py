"""ABC: attention over a bounded number of state slots, with learned or given control."""

from longctx.moved import names_of

__getattr__ = names_of(__name__, "bounded.abc.operator")
