"""What every test gets: the scripts on the path, a CPU, no network and a folder of its own."""
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
os.environ["CUDA_VISIBLE_DEVICES"] = ""         # bit for bit is a promise of the CPU alone
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Work in an empty folder, and fail on any connection beyond this machine."""
    monkeypatch.chdir(tmp_path)
    connect = socket.socket.connect

    def connect_here(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)
    monkeypatch.setattr(socket.socket, "connect", connect_here)


def randomise(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight, bias, norm and position at random: what starts at zero would hide an error."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            noise = 0.3 * noise + (1 if "norm" in name and name.endswith("weight") else 0)
        elif name != "pos_embed":
            noise = noise / parameter[0].numel() ** 0.5
        parameter.data = noise
    return net
