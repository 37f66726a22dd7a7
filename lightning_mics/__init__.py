"""lightning-mics: MiCS sharded data parallelism for PyTorch Lightning.

Importing this package registers the strategy name "mics", so that `Trainer(strategy="mics")` finds it, with
`lightning.pytorch` and with `pytorch_lightning`.
"""

from lightning_mics.checkpoint import consolidate
from lightning_mics.network import Network
from lightning_mics.strategy import MiCSStrategy, register
from lightning_mics.topology import Topology
from lightning_mics.version import __version__

__all__ = ["MiCSStrategy", "Network", "Topology", "__version__", "consolidate"]

register()
