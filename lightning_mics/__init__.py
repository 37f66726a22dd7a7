"""lightning-mics: MiCS sharded data parallelism for PyTorch Lightning."""
