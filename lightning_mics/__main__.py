"""`python -m lightning_mics`, which torchrun's -m starts as well: the command line."""

from mics_tools.cli import app

app(prog_name="mics")
