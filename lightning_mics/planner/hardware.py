"""Hardware: devices and clusters, as figures that were measured or published.

`hardware.toml` beside this file holds them, each with its source; a file of `mics probe` makes a cluster as well. Pure
Python.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from lightning_mics import network
from lightning_mics.planner.host import Host

FILE = Path(__file__).with_name("hardware.toml")
DTYPES = ("fp32", "tf32", "fp16", "bf16")
BACKENDS = ("nccl", "gloo")
_LEAST_LATENCY = 1e-9  # seconds, where large messages hide all of it

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Device:
    """One accelerator, or one core of a processor.

    Attributes:
        name: as in the file.
        memory_bytes: what can be allocated.
        memory_bandwidth: bytes per second, reads and writes together.
        peak_flops: dense floating-point operations per second, by dtype (`DTYPES`).
        matmul_share: of a peak, what large products of matrices reach.
        attention_share: likewise, what fused attention does on long sequences; None for as much as products, on all.
        bandwidth_share: of the memory bandwidth, what operators reach that do nothing but read and write.
        kernel: seconds that an operator takes beside its work, one behind the other.
        processors: that compute tiles of a product side by side; 1 where this is not known to matter.
        host_link: bytes per second between its memory and the host's, in one direction.
        host_memory: bytes per second that its rank gets of the host's memory, reads and writes together.
        layer_share: of its 16-bit peak, what a transformer layer has been measured to reach in forward and backward;
            nothing is computed by it, and None where nobody told.

    Raises:
        ValueError: for a figure that is not positive and finite, an unknown dtype, or a share over 1.
    """

    name: str
    memory_bytes: float
    memory_bandwidth: float
    peak_flops: Mapping[str, float]
    matmul_share: float = 1.0
    bandwidth_share: float = 1.0
    kernel: float = 5e-6
    processors: float = 1
    host_link: float = 12e9
    host_memory: float = 20e9
    layer_share: float | None = None
    attention_share: float | None = None

    def __post_init__(self) -> None:
        for dtype, peak in self.peak_flops.items():
            if dtype not in DTYPES:
                raise ValueError(f"peak_flops.{dtype} is unknown; choose of {', '.join(DTYPES)}")
            _check_positive(f"peak_flops.{dtype}", peak)
        for name in ("memory_bytes", "memory_bandwidth", "kernel", "processors", "host_link", "host_memory"):
            _check_positive(name, getattr(self, name))
        for name in ("matmul_share", "bandwidth_share", "layer_share", "attention_share"):
            share = getattr(self, name)
            if share is not None:
                _check_positive(name, share)
                if share > 1:
                    raise ValueError(f"{name}={share} must be 1 at most: it is a share of the peak")

    def peak(self, dtype: str) -> float:
        """Floating-point operations per second in `dtype`.

        Raises:
            ValueError: if this device has no figure for it.
        """
        if dtype not in self.peak_flops:
            raise ValueError(f"dtype={dtype!r}: {self.name} has a peak for {', '.join(self.peak_flops)} only")
        return self.peak_flops[dtype]


@dataclass(frozen=True)
class Tier:
    """One tier of a cluster's network: what joins units (devices, nodes, pods) into a larger one.

    Unlike `network.Tier`, whose bandwidth is one rank's while its whole node sends, these figures are of a unit's port,
    which a planner divides among whatever shares it.

    Attributes:
        name: for people.
        joins: units.
        bandwidth: bytes per second in each direction that collectives get out of one unit's port.
        latency: seconds of one hop of a few bytes.
        bulk_latency: seconds that a hop adds to messages large enough to reach `bandwidth`; by default `latency`.
        lane: bytes per second of one pair of ranks at most; by default `bandwidth`.
        line_rate: bytes per second that the port is sold as, at least `bandwidth`; by default the same.

    Raises:
        ValueError: for a figure that is not positive and finite, or one that contradicts another.
    """

    name: str
    joins: int
    bandwidth: float
    latency: float
    bulk_latency: float = 0.0
    lane: float = 0.0
    line_rate: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.joins, bool) or not isinstance(self.joins, int) or self.joins < 1:
            raise ValueError(f"joins={self.joins!r} must be a positive integer: how many units this tier joins")
        for name, default in (("bulk_latency", self.latency), ("lane", self.bandwidth), ("line_rate", self.bandwidth)):
            object.__setattr__(self, name, getattr(self, name) or default)
        for name in ("bandwidth", "latency", "bulk_latency", "lane", "line_rate"):
            _check_positive(name, getattr(self, name))
        if self.bandwidth > self.line_rate:
            raise ValueError(f"bandwidth={self.bandwidth:g} must be line_rate={self.line_rate:g} at most")

    def rate(self, lanes: int) -> float:
        """Bytes per second that so many pairs of ranks get through one port together, at most."""
        return min(self.bandwidth, lanes * self.lane)


@dataclass(frozen=True)
class Cluster:
    """Devices joined by tiers.

    Attributes:
        name: as in the file, or where a probe's figures come from.
        device: every rank's.
        tiers: from the inside out; the first joins the devices of a node, the last all that there is.
        backend: "nccl" or "gloo".
        algorithms: of the backend's, those in use; all if empty.
        protocols: likewise, of those between nodes.
        title: what it is, for people.
        channels: processors of each device that a collective keeps while it is under way.
        messages: inside a node, the backend's own, where this package goes another way (by memory, on CPU). Carrying
            them is the cores' work, so that costs count it of messages between nodes as well, and the sums' too.
        hosts: by engine, what its collectives cost the processors that compute; what nobody measured is told by
            `messages` and the device's memory. See `measured_host`.

    Raises:
        ValueError: for fewer than two tiers, an unknown backend, or channels that are negative or not finite.
    """

    name: str
    device: Device
    tiers: tuple[Tier, ...]
    backend: str = "nccl"
    algorithms: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()
    title: str = ""
    channels: float = 0
    messages: Tier | None = None
    hosts: Mapping[str, Host] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.channels) and self.channels >= 0):
            raise ValueError(f"channels={self.channels!r} must be finite and not negative; 0 where none are kept")
        if len(self.tiers) < 2:
            raise ValueError(f"tiers: {len(self.tiers)} given; a cluster has two at least, inside a node and between")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r} is unknown; choose of {', '.join(BACKENDS)}")

    @classmethod
    def of(cls, name: str, nodes: int, path: str | Path = FILE) -> Cluster:
        """A cluster of the hardware file.

        Args:
            name: of its entry.
            nodes: how many there are.
            path: of a file like `hardware.toml`.

        Raises:
            ValueError: if there is no such entry, or the file cannot be read; says what and where.
        """
        known = clusters(path)
        if name not in known:
            raise ValueError(f"cluster={name!r} is not in {path}; choose of {', '.join(known)}")
        return known[name].with_nodes(nodes)

    @classmethod
    def from_probe(
        cls,
        probe: str | Path | network.Network,
        device: Device | None = None,
        nodes: int | None = None,
        ranks_per_node: int | None = None,
    ) -> Cluster:
        """A cluster with the lines that `mics probe` has measured.

        Args:
            probe: its file, or the network that it measured.
            device: which devices these are; by default with the figures that were measured, if `probe` is a file that
                has them.
            nodes: how many to plan for; by default as many as were measured.
            ranks_per_node: by default as measured; needed where `probe` is not a file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it cannot be read, or does not tell what was left out here.
        """
        told: Mapping[str, Any] = {}
        if not isinstance(probe, network.Network):
            path, probe = Path(probe), network.Network.load(probe)
            told = json.loads(path.read_text())
        nodes, per_node = nodes or told.get("nodes"), ranks_per_node or told.get("ranks_per_node")
        if nodes is None or per_node is None:
            raise ValueError(f"nodes={nodes}, ranks_per_node={per_node}: the probe does not tell both; give them")
        device = device or _measured_device(told.get("figures"))
        intra = _measured_tier("intra-node", per_node, probe.intra)
        # What a rank had while all of its node sent is its share of the port.
        inter = _measured_tier("inter-node", nodes, probe.inter, per_node)
        messages = _measured_tier("messages", per_node, probe.messages) if probe.messages is not None else None
        hosts = _measured_hosts(told.get("hosts", {}))
        return cls(probe.source, device, (intra, inter), told.get("backend", "nccl"), messages=messages, hosts=hosts)

    def with_nodes(self, nodes: int) -> Self:
        """The same with another number of nodes, all of them in the outermost tier.

        Raises:
            ValueError: if they do not fill the units between.
        """
        *inner, outer = self.tiers
        unit = math.prod(tier.joins for tier in inner[1:])
        if nodes < 1 or nodes % unit:
            raise ValueError(f"nodes={nodes} must be a positive multiple of {unit} on {self.name}")
        return replace(self, tiers=(*inner, replace(outer, joins=nodes // unit)))

    @property
    def devices_per_node(self) -> int:
        return self.tiers[0].joins

    @property
    def nodes(self) -> int:
        return math.prod(tier.joins for tier in self.tiers[1:])

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def network(self) -> network.Network:
        """Its two lines, as the engine's collectives take them: of one rank while all of its node send at once."""
        inside, between = self.tiers[0], self.tiers[1]
        return network.Network(
            network.Tier(inside.bulk_latency, inside.bandwidth),
            network.Tier(between.bulk_latency, between.bandwidth / self.devices_per_node),
            self.name,
        )


def _measured_tier(name: str, joins: int, line: network.Tier, ranks: int = 1) -> Tier:
    bulk = line.bulk
    return Tier(name, joins, ranks * bulk.bandwidth, line.latency, max(bulk.latency, _LEAST_LATENCY))


def _measured_device(figures: Mapping[str, Any] | None) -> Device:
    if figures is None:
        raise ValueError("device=None: the probe tells no figures of its devices; give one, or run `mics probe` again")
    try:
        return Device(**figures)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"figures={figures!r} of the probe are no device's: {error}; run `mics probe` again"
        ) from error


def _measured_hosts(content: Mapping[str, Any]) -> dict[str, Host]:
    try:
        return {engine: Host.from_json(lines) for engine, lines in content.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"hosts of the probe are none: {error}; run `mics probe` again") from error


# -- the file ----------------------------------------------------------------------------------------------------------


def devices(path: str | Path = FILE) -> dict[str, Device]:
    """Every device of a hardware file, by name.

    Raises:
        ValueError: names the file, the entry and the field of what is wrong.
    """
    return {name: _device(where, name, entry) for where, name, entry in _entries(path, "devices")}


def clusters(path: str | Path = FILE) -> dict[str, Cluster]:
    """Every cluster of a hardware file, by name, with one unit in the outermost tier.

    Raises:
        ValueError: names the file, the entry and the field of what is wrong.
    """
    known = devices(path)
    return {name: _cluster(where, name, entry, known) for where, name, entry in _entries(path, "clusters")}


def _entries(path: str | Path, section: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Where each stands, its name, and what it says."""
    try:
        content = tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    entries = content.get(section)
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path}: there must be tables [{section}.<name>]")
    return [(f"{path}: {section}.{name}", name, entry) for name, entry in entries.items()]


def _device(where: str, name: str, entry: Mapping[str, Any]) -> Device:
    peaks = entry.get("peak_flops", {})
    peaks = {dtype: _figure(f"{where}.peak_flops.{dtype}", peak) for dtype, peak in peaks.items()}
    return _made(Device, where, entry, {"name": name, "peak_flops": peaks})


def _cluster(where: str, name: str, entry: Mapping[str, Any], known: Mapping[str, Device]) -> Cluster:
    if entry.get("device") not in known:
        raise ValueError(f"{where}.device={entry.get('device')!r} is not in the file; choose of {', '.join(known)}")
    tiers = tuple(_tier(f"{where}.tiers[{index}]", tier) for index, tier in enumerate(entry.get("tiers", ())))
    plain = {"name": name, "title": entry.get("title", name), "backend": entry.get("backend")}
    names = {name: tuple(entry.get(name, ())) for name in ("algorithms", "protocols")}
    return _made(Cluster, where, entry, plain | names | {"device": known[entry["device"]], "tiers": tiers})


def _tier(where: str, entry: Mapping[str, Any]) -> Tier:
    return _made(Tier, where, entry, {"name": entry.get("name"), "joins": entry.get("joins", 1)})


def _made(kind: type[_Kind], where: str, entry: Mapping[str, Any], plain: Mapping[str, Any]) -> _Kind:
    """What an entry describes. All but `plain` are figures."""
    known = {
        field.name: field.default is MISSING and field.default_factory is MISSING
        for field in fields(kind)  # type: ignore[arg-type]
    }
    if unknown := sorted(entry.keys() - known):
        raise ValueError(f"{where}.{unknown[0]} is unknown; choose of {', '.join(known)}")
    if missing := [name for name, required in known.items() if required and name not in entry and name not in plain]:
        raise ValueError(f"{where}.{missing[0]} is missing")
    figures = {name: _figure(f"{where}.{name}", value) for name, value in entry.items() if name not in plain}
    try:
        return kind(**figures, **plain)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _figure(where: str, value: object) -> float:
    match value:
        case [int() | float() as number, str(source)] if source.strip() and not isinstance(number, bool):
            _check_positive(where, number)
            return float(number)
    raise ValueError(f'{where}={value!r} must be a figure, [value, "where it comes from"]')


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r} must be positive and finite")
