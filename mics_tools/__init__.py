"""What needs neither torch nor Lightning, and starts in a tenth of a second: the `mics` command, and the manifest."""
