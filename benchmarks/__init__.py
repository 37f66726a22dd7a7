"""Benchmarks: a cluster on one machine, the peers to measure against, and the bound that none can beat."""
