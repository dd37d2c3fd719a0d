"""The launcher of several hosts: its agents, their messages, and the ranks' placement."""

from longctx.moved import names_of

__getattr__ = names_of(__name__, "launch.cluster.run")
