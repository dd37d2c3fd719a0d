"""Addresses and interfaces of this host, and the variables that bind transports to one."""

from __future__ import annotations

import os
import socket

import pytest

from longctx.network import address_of, address_towards, bind_towards, interface_with, sockets

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def test_the_loopback_leads_to_this_host() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    name = interface_with("127.0.0.1")
    assert name is not None and address_of(name) == "127.0.0.1"


def test_what_is_not_there_has_no_address() -> None:
    assert address_of("nothing0") is None and interface_with("203.0.113.9") is None
    with pytest.raises(OSError):
        address_towards("no-such-host.invalid")


def test_all_transports_are_bound_but_not_against_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = interface_with("127.0.0.1") or ""
    assert sockets(loopback) == dict.fromkeys(VARIABLES, loopback)
    for name in VARIABLES[1:]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    bind_towards("127.0.0.1")
    assert [os.environ[name] for name in VARIABLES] == ["eth7", loopback, loopback]


def test_an_unknown_host_binds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    bind_towards("elsewhere")
    assert not any(name in os.environ for name in VARIABLES)
