"""Run what the README tells its reader: ``commands FILE`` lists the set-up commands, ``run FILE`` runs the snippets.

The two set-up commands are the ```` ```sh ```` blocks under the heading "Set up". Every ```` ```python ```` and
```` ```console ```` block of the file is run, in order, in one new directory; lines of a console block that begin with
``$`` are commands.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return _BLOCK.findall(text)


def setup_commands(text: str) -> list[str]:
    """The commands under "Set up", a block each, joined to one line."""
    section = text.split("## Set up", 1)[1].split("\n## ", 1)[0]
    return [
        " ".join(line.rstrip("\\").strip() for line in body.splitlines())
        for lang, body in blocks(section)
        if lang == "sh"
    ]


def run(path: Path) -> int:
    """Run every snippet; the number of failures."""
    bin_directory = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}"}
    failures = 0
    with tempfile.TemporaryDirectory() as directory:
        for number, (language, body) in enumerate(blocks(path.read_text()), 1):
            if language == "python":
                commands = [[sys.executable, "-W", "error", "-c", body]]
            elif language == "console":
                lines = [line[2:] for line in body.splitlines() if line.startswith("$ ")]
                commands = [["bash", "-c", line] for line in lines]
            else:
                continue
            for command in commands:
                done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True)
                failed = done.returncode != 0
                failures += failed
                first_line = command[-1].strip().splitlines()[0]
                print(f"{'FAILED' if failed else 'ok    '} block {number} ({language}): {first_line}")
                if failed:
                    print(done.stdout[-2000:], done.stderr[-4000:])
    return failures


if __name__ == "__main__":
    action, file = sys.argv[1], Path(sys.argv[2]).resolve()
    if action == "commands":
        print("\n".join(setup_commands(file.read_text())))
    else:
        sys.exit(1 if run(file) else 0)
