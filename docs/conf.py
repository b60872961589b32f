"""Sphinx configuration: MyST pages, API pages from NumPy-style docstrings."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from docutils.utils.math.unichar2tex import uni2tex_table
from sphinx.application import Sphinx
from sphinx.util import inspect

# Keras picks its backend when it is imported, and autodoc imports it.
os.environ.setdefault("KERAS_BACKEND", "torch")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "adapters")]

import spectral_core  # noqa: E402  (the path comes first)

project = "spectral-core"
author = "spectral-core developers"
project_copyright = author
version = release = spectral_core.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

# MyST
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# API pages
autosummary_generate = True
autodoc_mock_imports = ["cupy"]  # CuPy needs a GPU to be of use
autodoc_typehints = "none"  # the docstrings say it in words
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
default_role = "py:obj"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# HTML
html_theme = "pydata_sphinx_theme"
html_title = f"spectral-core {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_sidebars = {"changelog": [], "design": []}  # pages without pages below them
html_theme_options = {
    "logo": {"text": "spectral-core"},
    "header_links_before_dropdown": 6,
    "navbar_end": ["theme-switcher"],
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_math_renderer = "mathml"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


# docutils reads operators by their TeX names only: ‖, ← and others are written as such here.
_COMMANDS = {c: f"{tex} " for c, tex in uni2tex_table.items() if not chr(c).isalnum()}
_COMMANDS[ord("·")] = r"\cdot "


def _mathml(tex: str, *, as_block: bool) -> str:
    return str(tex2mathml(tex.translate(_COMMANDS), as_block=as_block))


def _inline_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def _display_math(translator: Any, node: nodes.math_block) -> None:
    mathml = _mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="mathml">{mathml}</div>\n')
    raise nodes.SkipNode


def _escape_stack(
    _app: Sphinx, _what: str, _name: str, _obj: Any, _opt: Any, lines: list[str]
) -> None:
    # "(*stack, n)" in the type of a parameter is a shape, and no emphasis.
    lines[:] = [s if "``" in s else s.replace("(*stack", r"(\*stack") for s in lines]


def _own_signature(
    _app: Sphinx, what: str, _name: str, obj: Any, _opt: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    # Keras wraps the constructors of its optimizers.
    if what == "class" and signature == "(*args, **kwargs)":
        parameters = inspect.signature(obj.__init__, bound_method=True)
        return inspect.stringify_signature(parameters, show_annotation=False), returns
    return None


def setup(app: Sphinx) -> None:
    """Render mathematics as MathML, which browsers show without a script from another site."""
    app.connect("autodoc-process-signature", _own_signature)
    app.connect("autodoc-process-docstring", _escape_stack, priority=1000)  # after numpydoc
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(_inline_math, None),
        block_renderers=(_display_math, None),
    )
