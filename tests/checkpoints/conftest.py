from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def network():
    """A factory: every call has the same shapes and, from the global generator, other weights."""

    def build(width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))

    return build


@pytest.fixture
def state(network):
    torch.manual_seed(1)
    return network().state_dict()


class Tripwire:
    """Unpickled, it makes a directory: the proof that something in a file was run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def tripwire(tmp_path):
    """An object whose unpickling is noticed, and the check that it was not unpickled."""
    wire = Tripwire(tmp_path / "ran")
    yield wire
    assert not wire.target.exists()
