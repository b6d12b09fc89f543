"""The configuration of Sphinx, which builds these pages: ``sphinx-build -W docs build/docs``."""

project = "flax-googlenet"
author = "the authors of flax-googlenet"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # links to headings, as on a repository's page

# The notebooks run at every build, and an error in one of them fails it.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
maximum_signature_line_length = 88

html_theme = "sphinx_book_theme"
html_title = project
