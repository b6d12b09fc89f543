"""The configuration of Sphinx, which builds these pages: ``sphinx-build -W docs build/docs``."""

import re

import flax.typing
import jax
import optax
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

project = "flax-googlenet"
author = "the authors of flax-googlenet"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # links to headings, as on a repository's page

# The notebooks run at every build, and an error in one of them fails it.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
maximum_signature_line_length = 88

html_theme = "sphinx_book_theme"
html_title = project
html_copy_source = False

ALIASES = {
    stringify_annotation(alias, "smart"): name
    for name, alias in {
        "Dtype": flax.typing.Dtype,
        "OptState": optax.OptState,
        "PrecisionLike": jax.lax.PrecisionLike,
    }.items()
}
"""Long unions by the name that the source code has for them."""


def shorten(text: str | None) -> str | None:
    """Name types as the source code does, and drop the two arguments that every Flax module has."""
    if text is None:
        return None
    for expansion, name in ALIASES.items():
        text = text.replace(expansion, name)
    text = re.sub(r", parent: .*?, name: str \| None = None", "", text)
    text = re.sub(r"<(?:class '|built-in function )(?:\w+\.)*(\w+)'?>", r"\1", text)
    return re.sub(r"~?jax(?:lib)?\._\w+\.(?:\w+\.)*", "", text)


def setup(app: Sphinx) -> None:
    """Connect the function above to autodoc."""
    app.connect("autodoc-process-signature", lambda *event: tuple(map(shorten, event[-2:])))
