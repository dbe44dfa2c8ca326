"""Sphinx settings: `make docs` builds docs/_build/html, warnings being errors."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ.setdefault("RESODE_FAST", "1")  # the claims at their small size; RESODE_FAST=0 runs them in full

import docstrings  # noqa: E402
import notebooks  # noqa: E402
import tables  # noqa: E402

import resode  # noqa: E402
from resode.explorer import explorer_page, read_spectra  # noqa: E402

project = "resode"
author = "the resode developers"
copyright = "2026, the resode developers. Apache-2.0"
version = release = resode.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax lies in the site: formulas need no network
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
default_role = "py:obj"  # a name in backticks links to what it names

# Pages in Markdown
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3

# The API
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Source", "Shapes"]
viewcode_line_numbers = True

# The claims
sphinx_gallery_conf = {
    "examples_dirs": "../theory",
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "ignore_pattern": r"(^|[\\/])(?!plot_)\w+\.py$",
    "copyfile_regex": r"index\.rst",  # the front page, written by hand in theory/
    "within_subsection_order": "FileNameSortKey",
    "reset_modules": ("matplotlib", "tables.collect"),
    "backreferences_dir": "_generated/backreferences",
    "reset_modules_order": "both",
    "download_all_examples": False,
    "show_signature": False,
    "capture_repr": (),  # pages print what they show
    "write_computation_times": False,
    "remove_config_comments": True,
    "matplotlib_animations": False,
}

# The look
html_theme = "furo"
html_title = f"resode {release}"  # the version stands in every page's header
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_generated/extra"]  # what `setup` writes there lies beside the pages
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

# `make linkcheck` needs the network
linkcheck_anchors = False
linkcheck_timeout = 20


def extra():
    """What lies beside the pages: the explorer of a trained network, the tutorial's notebook."""
    place = ROOT / "docs" / "_generated" / "extra"
    place.mkdir(parents=True, exist_ok=True)
    notebooks.write(ROOT / "docs" / "tutorial.md", place / "tutorial.ipynb")
    page = explorer_page(
        read_spectra(ROOT / "docs" / "explorer.csv"),
        title="Stability explorer",
        source="The last two blocks of the demo's network at a test image: all 512 eigenvalues.",
    )
    (place / "explorer.html").write_text(page, encoding="utf-8")


def setup(app):
    """The hooks of this site."""
    extra()
    app.connect("autodoc-process-docstring", docstrings.escape, priority=100)  # before napoleon
    app.connect("doctree-read", docstrings.alias)
    app.connect("builder-inited", tables.write, priority=900)  # after the gallery has run
