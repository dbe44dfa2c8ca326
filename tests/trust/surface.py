"""The public surface: every public name with its signature, in `surface.txt`.

    python -m tests.trust.surface           say what differs from the file
    python -m tests.trust.surface --write   write the file anew: a change that users will meet, for the changelog

What is public is what `tests/test_api_docs.py` wants on the API's pages.
"""

from __future__ import annotations

import difflib
import enum
import inspect
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_api_docs import PUBLIC

FILE = Path(__file__).with_name("surface.txt")


def places() -> dict[str, object]:
    """Every public thing once, by the first of its dotted names."""
    found: dict[int, str] = {}
    for place, name in PUBLIC:
        found.setdefault(id(getattr(import_module(place), name)), f"{place}.{name}")
    return {dotted: resolve(dotted) for dotted in found.values()}


def resolve(dotted: str) -> object:
    place, name = dotted.rsplit(".", 1)
    return getattr(import_module(place), name)


def signature(thing: object) -> str:
    """As inspect's, whatever the Python: addresses of defaults and of partial objects are left out."""
    try:
        text = str(inspect.signature(thing))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    return re.sub(r"<(\w+) ([\w.]+) at 0x\w+>", r"<\1 \2>", re.sub(r" at 0x[0-9a-f]+", "", text))


def lines() -> list[str]:
    """One line a name; of classes their own public methods and properties too, of mappings their keys."""
    found, known = [], set()
    for place, name in sorted(set(PUBLIC)):
        thing = getattr(import_module(place), name)
        dotted = f"{place}.{name}"
        if inspect.ismodule(thing):
            found.append(f"module {dotted}")
        elif inspect.isclass(thing):
            bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
            shown = "" if issubclass(thing, enum.Enum | BaseException) else signature(thing)
            found.append(f"class {dotted}{shown}" + (f" of {bases}" if bases else ""))
            found += [] if thing in known else [f"    {member}" for member in members(thing)]
            known.add(thing)
        elif inspect.isroutine(thing):
            found.append(f"def {dotted}{signature(thing)}")
        else:
            content = thing if isinstance(thing, Mapping | tuple) else ()
            names = sorted(key if isinstance(key, str) else getattr(key, "prefix", "?") for key in content)
            found.append(f"data {dotted}: {', '.join(names)}")
    return found


def members(thing: type) -> list[str]:
    """Public methods, properties and class attributes that a class itself defines."""
    found = []
    for name, value in sorted(vars(thing).items()):
        if name.startswith("_") and name not in ("__call__", "__enter__", "__exit__"):
            continue
        if isinstance(value, property):
            found.append(f"{name} (property)")
        elif isinstance(value, staticmethod | classmethod):
            found.append(f"{name}{signature(value.__func__)} ({type(value).__name__})")
        elif inspect.isfunction(value):
            found.append(f"{name}{signature(value)}")
    return found


def differences() -> list[str]:
    """What was removed (-) and added (+) since the file was written."""
    stored = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    changes = difflib.unified_diff(stored, lines(), lineterm="", n=0)
    return [line for line in changes if not line.startswith(("---", "+++", "@@"))]


if __name__ == "__main__":
    changed = differences()
    print("\n".join(changed) or "the public surface is as the file says")
    if "--write" in sys.argv[1:]:
        FILE.write_text("\n".join(lines()) + "\n", encoding="utf-8")
    elif changed:
        sys.exit(1)
