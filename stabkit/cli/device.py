"""Which device a command runs on, and which each of several ranks takes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stabkit.errors import StabkitError

if TYPE_CHECKING:
    import torch


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` names; of several ranks on one host, each has its own.

    Raises:
        StabkitError: there is no such device.
    """
    import torch

    try:
        device = torch.device(name)
        if device.type == "cuda" and ":" not in name and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise StabkitError(
            f"--device {name!r} cannot be used: {why}; expected cpu, or a device that torch sees"
        ) from None
    if device.type == "meta":
        raise StabkitError("--device 'meta' holds no numbers; expected cpu or cuda")
    return device
