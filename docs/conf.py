"""Sphinx builds the site from this folder's Markdown: `make docs`. Nothing in it is fetched from elsewhere."""

from vllm_mtp import __version__

project = "vllm-mtp"
release = version = __version__
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"vllm-mtp {release}"
html_copy_source = False
html_show_copyright = False
nitpicky = True
