"""The multi-host launcher: placement of ranks, start commands, agents, control connections, supervision."""

from longctx.moved import names_of

__getattr__ = names_of(__name__, "launch.cluster.run")
