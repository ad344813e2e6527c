"""Sphinx configuration. `make docs` builds with warnings as errors."""

from __future__ import annotations

import importlib.metadata
from typing import Any, ClassVar

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from torchrl_sglang.generate.sampling_names import ALIASES, REFUSED

project = "torchrl_sglang"
author = "torchrl_sglang contributors"
copyright = author
release = importlib.metadata.version("torchrl-sglang")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
smartquotes = False  # they would spoil code in plain text
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


class SamplingNames(SphinxDirective):
    """A table of other libraries' names for sampling options, read from the code."""

    required_arguments = 1
    tables: ClassVar[dict[str, tuple[str, str, dict[str, str]]]] = {
        "aliases": (
            "Name",
            "Here",
            {name: f"``{own}``" for name, own in ALIASES.items()}
            | {"do_sample": "``temperature=0`` where it is False"},
        ),
        "refused": ("Name", "Instead", REFUSED),
    }

    def run(self) -> list[nodes.Node]:
        first, second, rows = self.tables[self.arguments[0]]
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 30 70", ""]
        lines += [f"   * - {first}", f"     - {second}"]
        for name, meaning in rows.items():
            text = meaning[:1].upper() + meaning[1:]
            lines += [f"   * - ``{name}``", f"     - {text}"]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Any) -> None:
    """Leaves the errors to their own page, so that each has one place to link to."""
    app.add_directive("sampling-names", SamplingNames)

    def skip_error(
        app: Any, what: str, name: str, obj: Any, skip: bool, options: Any
    ) -> bool | None:
        is_error = isinstance(obj, type) and issubclass(obj, Exception)
        return True if is_error and app.env.docname == "api" else None

    app.connect("autodoc-skip-member", skip_error)
