"""Sphinx configuration. `make docs` builds with warnings as errors."""

from __future__ import annotations

import importlib.metadata
from typing import Any

project = "torchrl_sglang"
author = "torchrl_sglang contributors"
copyright = author
release = importlib.metadata.version("torchrl-sglang")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "alabaster"
html_theme_options = {
    "description": "SGLang as the rollout engine of a TorchRL training loop",
    "fixed_sidebar": True,
    "page_width": "1080px",
}
html_show_sphinx = False

# `name` in a docstring is a reference where it names an object, and plain code elsewhere.
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# TorchRL's docstrings are not ours to show, or to be warned about.
autodoc_inherit_docstrings = False


def setup(app: Any) -> None:
    """Leaves the errors to their own page, so that each has one place to link to."""

    def skip_error(
        app: Any, what: str, name: str, obj: Any, skip: bool, options: Any
    ) -> bool | None:
        is_error = isinstance(obj, type) and issubclass(obj, Exception)
        return True if is_error and app.env.docname == "api" else None

    app.connect("autodoc-skip-member", skip_error)
