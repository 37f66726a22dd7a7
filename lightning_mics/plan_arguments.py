"""What `mics plan` and `mics simulate` are asked: key=value arguments, some of them Hydra's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mics.ladder import AUTO, Rung
from lightning_mics.offload import Offload
from lightning_mics.optimizer_shards import OptimizerState
from lightning_mics.planner import hardware
from lightning_mics.planner.hardware import Cluster, Device
from mics_tools.units import in_bytes

# Hydra would take them, and the planner would not look at them.
_SAID_OTHERWISE = {
    "strategy.partition_size": "partition_size",
    "strategy.rung": "rung",
    "strategy.memory_budget": "memory_budget",
    "trainer.num_nodes": "nodes",
}


@dataclass(frozen=True)
class Arguments:
    """A question to the planner. What is None, the planner or the configuration chooses.

    Attributes:
        cluster: an entry of the hardware file, or the path of a file that `mics probe` wrote.
        model: `package.module:factory`, or one of the configuration.
        device: an entry of the hardware file's devices, for a probe's file that does not tell what it measured of them.
        nodes: how many.
        batch: samples of an optimizer step, of all ranks.
        micro_batch: samples of a rank in a micro-step.
        window: micro-steps of an optimizer step.
        partition_size: p.
        rung: what stays whole.
        memory_budget: bytes (an int), or a share of the device's memory (a float).
        precision: as Lightning's.
        checkpointing: whether blocks compute their forward again in backward.
        optimizer_state: over which ranks it is sharded.
        offload: what is in the host's memory.
        seq_len: tokens of a sample.
        hardware: the file with devices and clusters.
        overrides: of the configuration.
    """

    cluster: str
    model: str | None = None
    device: str | None = None
    nodes: int | None = None
    batch: int | None = None
    micro_batch: int | None = None
    window: int | None = None
    partition_size: int | None = None
    rung: Rung | None = None
    memory_budget: int | float = 0.9
    precision: str | None = None
    checkpointing: bool | None = None
    optimizer_state: OptimizerState | None = None
    offload: Offload | None = None
    seq_len: int | None = None
    hardware: Path = hardware.FILE
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, words: Iterable[str]) -> Arguments:
        """What a user wrote, as `cluster=p3dn`. Keys that are not the command's own go to Hydra.

        Raises:
            ValueError: for what is not key=value, a value that cannot be, or where `cluster` is missing.
        """
        own: dict[str, Any] = {}
        overrides = []
        for word in words:
            key, is_pair, value = word.partition("=")
            if not is_pair and not word.startswith("~"):
                raise ValueError(f"{word!r} must be key=value; keys are {', '.join(_READ)}, and those of Hydra")
            if (said := key.lstrip("+")) in _SAID_OTHERWISE:
                raise ValueError(f"{said}={value} is not looked at; give {_SAID_OTHERWISE[said]}={value}")
            if key in _READ:
                own[key] = _READ[key](key, value)
            else:
                overrides.append(word)
        if "cluster" not in own:
            raise ValueError(f"cluster is missing; give cluster= one of {', '.join(hardware.clusters())}, or a file")
        return cls(**own, overrides=tuple(overrides))

    def planned_cluster(self, *, of_any_size: bool = False) -> Cluster:
        """The cluster, with `nodes`, or as many as were probed.

        Args:
            of_any_size: whether the hardware file's number of nodes will do.

        Raises:
            ValueError: if there is none of this name, or something of it is unknown.
        """
        if not self.hardware.is_file():
            raise ValueError(f"hardware={str(self.hardware)!r}: there is no such file")
        known = hardware.clusters(self.hardware)
        if self.cluster not in known and Path(self.cluster).is_file():
            return Cluster.from_probe(self.cluster, self._device(), self.nodes)
        if self.cluster not in known:
            raise ValueError(
                f"cluster={self.cluster!r} is neither in {self.hardware.name}, which has {', '.join(known)}, nor a "
                "file; `mics probe` writes one"
            )
        if self.device is not None:
            raise ValueError(f"device={self.device!r}: the devices of {self.cluster} are known; leave it out")
        cluster = known[self.cluster]
        if self.nodes is None and not of_any_size:
            raise ValueError(f"nodes is missing: how many there are of {self.cluster}; give nodes=16, for instance")
        return cluster if self.nodes is None else cluster.with_nodes(self.nodes)

    def _device(self) -> Device | None:
        """For a probe's file, which tells by itself if it has measured the device."""
        if self.device is None:
            return None
        known = hardware.devices(self.hardware)
        if self.device not in known:
            raise ValueError(
                f"device={self.device!r}: say what the devices of {self.cluster} are; choose of {', '.join(known)}"
            )
        return known[self.device]


def _text(key: str, value: str) -> str:
    if not value:
        raise ValueError(f"{key}= is empty; give a value, or leave it out")
    return value


def _number(key: str, value: str) -> int:
    if not value.isdecimal() or not int(value):
        raise ValueError(f"{key}={value} must be a positive integer")
    return int(value)


def _number_or_auto(key: str, value: str) -> int | None:
    return None if value == AUTO else _number(key, value)


def _truth(key: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{key}={value} must be true or false")
    return value.lower() == "true"


def _budget(key: str, value: str) -> int | float:
    if re.fullmatch(r"0?\.\d+|1\.0*", value):
        return float(value)
    try:
        return in_bytes(value)
    except ValueError:
        raise ValueError(f"{key}={value} must be a share of the device's memory, as 0.9, or a size, as 30GiB") from None


def _rung(key: str, value: str) -> Rung | None:
    return None if value == AUTO else Rung.parse(value)


def _optimizer_state(key: str, value: str) -> OptimizerState:
    return OptimizerState.parse(value, key)


def _offload(key: str, value: str) -> Offload | None:
    return None if value in ("none", "null") else Offload.parse(value, key)


def _path(key: str, value: str) -> Path:
    return Path(_text(key, value))


_READ: dict[str, Callable[[str, str], Any]] = {
    "model": _text,
    "cluster": _text,
    "device": _text,
    "nodes": _number,
    "batch": _number,
    "micro_batch": _number,
    "window": _number,
    "partition_size": _number_or_auto,
    "rung": _rung,
    "memory_budget": _budget,
    "precision": _text,
    "checkpointing": _truth,
    "optimizer_state": _optimizer_state,
    "offload": _offload,
    "seq_len": _number,
    "hardware": _path,
}
