"""Launching: what all processes of one run must agree on, whoever started them.

Lightning's launcher, torchrun and SLURM each start the same script several times. Here the processes agree on one name
for the run, each writes a log of its own, and the command is found that goes on from a checkpoint.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment

RUN_ID = "LIGHTNING_MICS_RUN_ID"
_LIBRARIES = (
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    "pytorch_lightning",
    "lightning_fabric",
    "transformers",
)
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# From glibc's malloc.h.
_M_MMAP_THRESHOLD = -3
# A value that Hydra reads as it is, without quotes.
_PLAIN = re.compile(r"[\w./:+~@-]+")


def agree_on_run_id() -> str:
    """The run's name, the same in all of its processes; also put into the environment as `LIGHTNING_MICS_RUN_ID`.

    SLURM's job and step, or the time at which the first process looked: under torchrun through its store, under
    Lightning's launcher through the environment that the others inherit.
    """
    if RUN_ID not in os.environ:
        os.environ[RUN_ID] = _slurm_run_id() if SLURMEnvironment.detect() else _timed_run_id()
    return os.environ[RUN_ID]


def _slurm_run_id() -> str:
    return f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', '0')}"


def _timed_run_id() -> str:
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if not dist.is_torchelastic_launched():
        return now
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return os.environ["TORCHELASTIC_RUN_ID"]
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return store.compare_set(f"lightning_mics/{RUN_ID}", "", now).decode()


def return_freed_memory() -> None:
    """Make glibc give large freed blocks back to the system; without glibc nothing happens.

    It keeps them by default, and a sharded model on CPU gathers and frees blocks of many sizes: resumed BERT large in
    four processes grew beyond 5.7 GB each, and stays at 5.2 GB so. 4 MiB would make that 4.6 GB, and double the time
    that a small model spends in the system.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 16 * 2**20)


def started_from_outside() -> bool:
    """Whether something other than Lightning's launcher started this process, or will start its siblings."""
    return "LOCAL_RANK" in os.environ or SLURMEnvironment.detect()


def process_rank(devices: Any) -> int:
    """This process's rank, before any process group exists.

    Args:
        devices: processes per node, as given to the Trainer; needed by Lightning's launcher on several nodes.
    """
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    if SLURMEnvironment.detect():
        return int(os.environ["SLURM_PROCID"])
    per_node = devices if isinstance(devices, int) and devices > 0 else 1
    return int(os.environ.get("NODE_RANK", 0)) * per_node + int(os.environ.get("LOCAL_RANK", 0))


def refuse_sweep(devices: Any, num_nodes: int) -> None:
    """Stop a `--multirun` that Lightning's launcher would start processes for.

    Args:
        devices: processes per node, as given to the Trainer.
        num_nodes: as given to the Trainer.

    Raises:
        SystemExit: with the reason and the way out, before any process is started.
    """
    if started_from_outside() or (devices in (1, "1") and num_nodes == 1):
        return
    raise SystemExit(
        f"--multirun cannot be used with trainer.devices={devices} under Lightning's launcher: it starts every further "
        "process with this same command, and each of them would run the whole sweep again.\n"
        "Run one configuration after the other:\n"
        f"  for lr in 1e-3 3e-3; do python {sys.argv[0]} optim.optimizer.lr=$lr; done\n"
        "or let torchrun start the processes, once for the whole sweep:\n"
        f"  torchrun --standalone --nproc-per-node 4 {sys.argv[0]} --multirun optim.optimizer.lr=1e-3,3e-3"
    )


def log_to_files(folder: Path, rank: int) -> Path:
    """Write everything that is logged or warned to `folder/rank_<rank>.log`; rank 0's warnings to the terminal too.

    Returns:
        The log file.
    """
    path = folder / f"rank_{rank}.log"
    handlers: list[logging.Handler] = [logging.FileHandler(path)]
    if rank == 0:
        terminal = logging.StreamHandler()
        terminal.setLevel(logging.WARNING)
        handlers.append(terminal)
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, handlers=handlers, force=True)
    logging.captureWarnings(True)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    # A resumed run has a folder of its own.
    warnings.filterwarnings("ignore", message="The dirpath has changed")
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    return path


def resume_command(
    checkpoint: Path, overrides: Sequence[str], *, max_steps: int, environment: Mapping[str, str] = os.environ
) -> str:
    """The shell command that goes on from `checkpoint` up to `max_steps`, started as this run was.

    Args:
        checkpoint: where to go on.
        overrides: of this run, as Hydra tells them.
        max_steps: optimizer steps in all.
        environment: of this process.
    """
    replaced = ("ckpt_path=", "trainer.max_steps=")
    kept = [override for override in overrides if not override.lstrip("+").startswith(replaced)]
    path = str(checkpoint)
    if not _PLAIN.fullmatch(path):
        path = "'" + path.replace("'", r"\'") + "'"
    arguments = [sys.argv[0], *kept, f"trainer.max_steps={max_steps}", f"ckpt_path={path}"]
    return f"{_launcher(environment)} {shlex.join(arguments)}"


def _launcher(environment: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" not in environment:
        return "srun python" if "SLURM_PROCID" in environment else "python"
    per_node, nodes = environment["LOCAL_WORLD_SIZE"], environment["GROUP_WORLD_SIZE"]
    if nodes == "1":
        return f"torchrun --standalone --nproc-per-node {per_node}"
    return (
        f"torchrun --nnodes {nodes} --nproc-per-node {per_node} --rdzv-backend c10d "
        f"--rdzv-endpoint {environment['MASTER_ADDR']}"
    )
