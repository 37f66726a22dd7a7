"""lightning-mics: MiCS sharded data parallelism for PyTorch Lightning.

Importing this package registers the strategy name "mics", so that `Trainer(strategy="mics")` and
`Fabric(strategy="mics")` find it: with `lightning`, and with `pytorch_lightning` and `lightning_fabric`.
"""

import sys

from lightning_mics import fabric, strategy
from lightning_mics._compat import log_as
from lightning_mics.checkpoint import consolidate
from lightning_mics.fabric import MiCSFabricStrategy
from lightning_mics.network import Network
from lightning_mics.strategy import MiCSStrategy
from lightning_mics.topology import Topology
from lightning_mics.version import __version__

__all__ = ["MiCSFabricStrategy", "MiCSStrategy", "Network", "Topology", "__version__", "consolidate"]

strategy.register()
fabric.register()

log_as(next(name for name in sys.modules if name in ("lightning", "pytorch_lightning")))  # the first that was imported
