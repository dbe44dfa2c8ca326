"""The oldest versions that pyproject.toml allows, as pip's constraints: `make oldest` installs and tests them.

    python -m tests.trust.oldest [NAME=VERSION …]

A version given takes the place of a package's oldest, where an index has no such build.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
USED = ("train", "tensorboard", "dev")
TOOLS = ("ruff", "pyright", "pre-commit")
"""Of the developer: they run on the code, and the code does not run on them."""


def bounds() -> dict[str, str]:
    """The least version of everything that the library and its tests import."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in USED:
        wanted += project["optional-dependencies"][extra]
    found = {}
    for requirement in wanted:
        match = re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", requirement)
        if match and match[1] not in TOOLS:
            found[match[1]] = match[2]
        elif not requirement.startswith("resode") and not match:
            raise ValueError(f"{requirement!r} has no least version")
    return found


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    for name, version in (bounds() | given).items():
        print(f"{name}=={version}")
