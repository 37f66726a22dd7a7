"""Compatibility: other people's tests and scripts, run against this package."""
