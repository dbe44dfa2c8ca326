"""Docstrings for Sphinx: text in which single backticks mark code, and nothing else is markup.

|R(z)| is an absolute value, `*shape` and **options are Python's stars, and η_ has no target: outside of
backticks and doctests these characters are escaped.
"""

import re

from sphinx import addnodes

_CODE = re.compile(r"(`+[^`]+`+)")
_MARKUP = re.compile(r"[|*\\]|(?<=\w)_(?!\w)")


def escape(app, what, name, obj, options, lines):
    """Escapes what would be markup, in place; doctests and directives stay as they are."""
    literal = False
    for number, line in enumerate(lines):
        literal = line.lstrip().startswith((">>>", "..")) or (literal and bool(line.strip()))
        if not literal:
            parts = _CODE.split(line)
            text = [_MARKUP.sub(r"\\\g<0>", part) for part in parts[::2]]
            parts[::2] = [rf"\ {t}" if i and t[:1].isalpha() else t for i, t in enumerate(text)]  # `X`s
            lines[number] = "".join(parts)


def alias(app, doctree):
    """Adds the anchor `resode.X` where X is documented under a longer path.

    The ways back from viewcode's listings take one prefix for a whole module, that of any name in it.
    """
    for signature in doctree.findall(addnodes.desc_signature):
        anchor = f"resode.{signature.get('fullname')}"
        if signature.get("fullname") and anchor not in doctree.ids:
            signature["ids"].append(anchor)
            doctree.ids[anchor] = signature
