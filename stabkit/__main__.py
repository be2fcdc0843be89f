"""``python -m stabkit``."""

from __future__ import annotations

from stabkit.cli import main

if __name__ == "__main__":
    main()
