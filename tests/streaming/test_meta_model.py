from __future__ import annotations

import threading

import torch
from torch import nn

from stabkit.streaming.meta_model import without_weights


def test_only_what_this_thread_builds_has_no_weights():
    register, made = nn.Module.register_parameter, []
    with without_weights():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 3)))
        thread.start()
        thread.join()
        own = nn.BatchNorm1d(3)
        assert nn.Module.register_parameter is register
    assert (own.weight.device.type, own.running_mean.device.type) == ("meta", "cpu")
    assert made[0].weight.device.type == "cpu"
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.equal(own.running_mean, torch.zeros(3))
