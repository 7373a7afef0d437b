"""Sphinx settings: `make docs` builds build/docs and runs every lesson. Nothing is downloaded."""

import os

import zeropoint

project = "zeropoint"
release = zeropoint.__version__
copyright = "the authors of zeropoint, Apache-2.0"  # noqa: A001

extensions = ["myst_nb"]
html_theme = "furo"
html_title = "zeropoint"
html_copy_source = False
html_show_sourcelink = False

myst_enable_extensions: list[str] = []  # no dollarmath: prices and shell variables stay text
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # seconds a cell, on a machine that does other things too
nb_merge_streams = True

_KERNEL_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm misses ipywidgets
}


def setup(app: object) -> None:
    """Called by Sphinx. Kernels are processes of their own, and inherit the environment."""
    os.environ |= _KERNEL_ENVIRONMENT
