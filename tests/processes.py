"""How a process that took part in a distributed run ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave() -> NoReturn:
    """End this process well, without taking its interpreter down.

    Worker threads of gloo outlive ``destroy_process_group``, because device meshes keep the group. One that lets go of
    a tensor while the interpreter is taken down needs its lock, is ended by Python, and the process aborts with
    "terminate called without an active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
