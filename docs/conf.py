"""The documentation site. The source folder is the repository itself, so that a link that works on
a code host works here too, also where it leaves docs/."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
# The package of this checkout, whatever is installed; and the extension of this folder.
sys.path[:0] = [str(ROOT), str(HERE / "_ext")]

from ctrak_lightning import __version__  # noqa: E402

project = "ctrak-lightning"
author = "the ctrak-lightning contributors"
version = release = __version__
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "written"]
root_doc = "docs/README"
include_patterns = [
    "*.md",
    "docs/**.md",
    "recipes/**.md",
    "tests/stress/results/**.md",
]
exclude_patterns = [
    ".*",
    "demo",
    "runs",
    "build",
    "dist",
    "docs/_build",
    "docs/notebooks/runs",
    "**/__pycache__",
]
# Tables that a script writes begin with a smaller heading, or none; and are linked, not listed.
suppress_warnings = ["myst.header", "toc.not_included"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
myst_dmath_double_inline = False

nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 1800  # of a cell, on a machine that has other things to do
nb_merge_streams = True
# Lightning's remarks on machine and loggers, and progress bars.
nb_output_stderr = "remove"
nb_render_markdown_format = "gfm"
# They would come from another host.
nb_ipywidgets_js: dict[str, dict[str, str]] = {}

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False

pygments_dark_style = "github-dark"
html_theme = "furo"
html_title = f"ctrak-lightning {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {"color-brand-primary": "#1f5f9e", "color-brand-content": "#1f5f9e"},
    "dark_css_variables": {"color-brand-primary": "#7ab7f0", "color-brand-content": "#7ab7f0"},
}
templates_path = ["_templates"]
# Whoever opens the folder itself is led to the front page.
html_additional_pages = {"index": "index.html"}

# What the notebooks make for the site as it is: the page of a report.
PUBLISHED = HERE / "notebooks" / "runs" / "published"
PUBLISHED.mkdir(parents=True, exist_ok=True)
html_extra_path = [str(PUBLISHED)]
