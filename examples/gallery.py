"""The gallery: a page with every example, what it shows, and its picture, made from the examples themselves."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def page() -> str:
    """The page as Markdown: each example's first line, its lesson, its picture and how to run it."""
    lines = [
        "# Examples",
        "",
        "Each is a script that ends with a picture: `python examples/NAME.py [PICTURE]`.",
    ]
    for script in sorted(FOLDER.glob("*.py")):
        picture = script.with_suffix(".png")
        if not picture.exists():
            continue
        text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        title, _, lesson = text.partition("\n\n")
        lines += ["", f"## {title.rstrip('.')}", "", lesson.strip(), "", f"![{title}]({picture.name})", ""]
        lines += [f"[{script.name}]({script.name})"]
    return "\n".join(lines) + "\n"


def main(out: Path) -> None:
    """Write the page."""
    out.write_text(page(), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("gallery.md"))
