"""Sphinx configuration; `make docs` builds with warnings as errors."""

import base64
import json
import os
import shutil
from importlib.metadata import version as installed_version
from pathlib import Path

DOCS = Path(__file__).resolve().parent

# -- Project -------------------------------------------------------------------------------------

project = "pyro_ext"
author = "pyro_ext contributors"
copyright = "pyro_ext contributors"
release = version = installed_version("pyro-ext")

# -- Sources -------------------------------------------------------------------------------------

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_design",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Notebooks are committed with their outputs: show those.
nb_execution_mode = "off"

# Sphinx reads only below this folder, and the notebooks live with the tutorials.
notebooks = DOCS / "tutorials" / "notebooks"
shutil.rmtree(notebooks, ignore_errors=True)
for notebook in (DOCS.parent / "tutorials").glob("*/*.ipynb"):
    folder = notebooks / notebook.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(notebook, folder)
    # The list of tutorials shows the picture of the cell with the tag "gallery".
    for cell in json.loads(notebook.read_text())["cells"]:
        if "gallery" in cell["metadata"].get("tags", ()):
            pictures = [out["data"]["image/png"] for out in cell["outputs"] if "data" in out]
            (folder / "gallery.png").write_bytes(base64.b64decode(pictures[0]))

# Links into the documentation of Python, torch and Pyro need the network: on request only.
if os.environ.get("PYRO_EXT_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "pyro": ("https://docs.pyro.ai/en/stable", None),
    }

# -- API reference -------------------------------------------------------------------------------

# Docstrings are in Pyro's dialect (`:param x:`), which autodoc understands as it is.
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
add_module_names = False
python_maximum_signature_line_length = 88

# -- HTML ----------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"pyro_ext {release}"
html_static_path = ["_static"]
html_css_files = ["gallery.css"]
