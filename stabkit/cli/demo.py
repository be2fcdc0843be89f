"""`stabkit demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stabkit.cli.console import screen
from stabkit.cli.options import Seed, command


@command
def demo(
    out: Annotated[Path, typer.Option(help="Where checkpoints, reports and pictures go.", metavar="DIR")] = Path(
        "stabkit-demo"
    ),
    seed: Seed = 0,
) -> None:
    """Train two networks on digits and analyse both."""
    from stabkit import demo as embedded

    embedded.run(out, seed, screen(), screen(stderr=True))
