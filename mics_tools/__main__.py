"""`python -m mics_tools`: the command line, where the script `mics` is not at hand."""

from mics_tools.cli import app

app(prog_name="mics")
