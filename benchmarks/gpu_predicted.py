"""Predicted on a GPU: the planner's memory and seconds beside those of real training on one device.

    python -m benchmarks.gpu_predicted                                   # one GPU, two minutes
    python -m benchmarks.gpu_predicted --device cpu --case "tiny gpt2"   # without one, to see that it runs
    python -m benchmarks.gpu_predicted --again FOLDER                    # the planner as it is now; nothing is measured

One rank is predicted whole: the most that it holds, and an optimizer step's seconds, from the figures that
`lightning_mics.planner.measured` takes of the device, with a block of the model, as where a fit is planned, and with a
tiny one, as `mics probe` by itself; and where the hardware file has the device, from the file's as well. Several ranks
share the one device by gloo, as in `benchmarks.gpu_exercise`: what each holds is compared, and no time, as they compute
in turns.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.multiprocessing
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import AdamW

from benchmarks import one_device
from benchmarks.gpu_cases import CASES, TINY, Case, loss_of
from benchmarks.results import about
from lightning_mics import memory
from lightning_mics.groups import Groups
from lightning_mics.ladder import Rung
from lightning_mics.offload import Offload, step_on_host
from lightning_mics.optimizer_shards import OptimizerState
from lightning_mics.planner import hardware, measured
from lightning_mics.planner.block_call import BlockCall
from lightning_mics.planner.compute import Compute
from lightning_mics.planner.hardware import Cluster, Device, Tier
from lightning_mics.planner.plan import Planner, Workload
from lightning_mics.planner.state import OptimizerBytes
from lightning_mics.planner.step import Work, simulate
from lightning_mics.precision import Precision
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology

FORMAT = 2
_FOLDER = Path(__file__).parent / "results"
_STEPS = 5  # that are timed
_LAYERS_AT_REST = 2
_ITS_BLOCK, _TINY_BLOCK = "its block", "a tiny block"
_IN_FILE = {"H100 80GB HBM3": "h100-80gb", "A100-SXM4-80GB": "a100-80gb", "A100-SXM4-40GB": "a100-40gb"}
"""Devices of the hardware file, by a part of the name by which CUDA has them."""

app = typer.Typer(add_completion=False)
console = Console(width=max(140, Console().width))


@dataclass(frozen=True)
class Setup:
    """One way to train one model.

    Attributes:
        case: the model and its micro-batch.
        precision: "bf16-true" or "bf16-mixed".
        window: micro-steps of an optimizer step.
        ranks: on the one device.
        partition_size: p.
        rung: what stays whole.
        optimizer_state: over which ranks it is sharded.
        offload: what is in the host's memory.
    """

    case: Case
    precision: str = "bf16-true"
    window: int = 1
    ranks: int = 1
    partition_size: int = 1
    rung: str = "block/sharded"
    optimizer_state: str = "partition"
    offload: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.case.name}, {self.case.batch} x {self.window}", self.precision]
        parts += ["recomputed"] * self.case.checkpointing
        parts += [f"n = {self.ranks}, p = {self.partition_size}, {self.rung}"] * (self.ranks > 1)
        parts += ["optimizer over all ranks"] * (self.optimizer_state == "world")
        parts += [f"offload {self.offload}"] * bool(self.offload)
        return ", ".join(parts)

    @property
    def topology(self) -> Topology:
        """One node."""
        return Topology(self.ranks, self.ranks, self.partition_size)

    @property
    def of_precision(self) -> Precision:
        """With bf16-mixed, shards are fp32."""
        return Precision(torch.bfloat16) if self.precision == "bf16-mixed" else Precision()

    def build(self, device: torch.device, layers: int | None = None) -> nn.Module:
        """The model; recomputing is left to the engine."""
        case = replace(self.case, checkpointing=False, layers=layers or self.case.layers)
        model = case.build(device)
        return model.float() if self.precision == "bf16-mixed" else model

    def workload(self) -> Workload:
        """The same for the planner."""
        module = self.build(torch.device("meta"))
        return Workload(
            module=module,
            batch=lambda size: torch.zeros(size, self.case.tokens, dtype=torch.long),
            step=loss_of,
            precision=self.of_precision,
            optimizer=OptimizerBytes.measure(AdamW, next(module.parameters()).dtype, "cuda"),
            optimizer_state=OptimizerState.parse(self.optimizer_state, "optimizer_state"),
            activation_checkpointing=self.case.checkpointing,
            offload=Offload.of(self.offload),
        )


@dataclass(frozen=True)
class Measured:
    """What a setup took.

    Attributes:
        grown: bytes from rest to the peak of an optimizer step, of each rank.
        reserved: the most bytes that the allocator had of the device, of each rank, what it had at rest among them.
        seconds: of an optimizer step, several times; empty with several ranks.
    """

    grown: list[int]
    reserved: list[int]
    seconds: list[float]


@dataclass(frozen=True)
class Result:
    """A setup, what it took, and what was said of it.

    Attributes:
        setup: for people.
        measured: what it took.
        bytes: by the planner.
        moment: at which it says that a rank holds most.
        by_kind: those bytes in parts.
        figures: of the device, by their source.
        seconds: of an optimizer step, by the source; empty with several ranks.
    """

    setup: str
    measured: Measured
    bytes: int
    moment: str
    by_kind: dict[str, int]
    figures: dict[str, Device]
    seconds: dict[str, float]

    @property
    def memory_error(self) -> float:
        """As a share of what the rank that holds most has measured; positive where the planner says too much."""
        return self.bytes / max(1, *self.measured.grown) - 1  # what is tiny may find room that was there

    def seconds_error(self, source: str) -> float:
        """Likewise, of the seconds by one source."""
        return self.seconds[source] / median(self.measured.seconds) - 1


_BERT, _GPT2 = CASES["bert-large"], CASES["gpt2-xl"]
_BERT_32 = replace(_BERT, batch=32)
_GPT2_MEDIUM = Case("gpt2-medium", "gpt2", 24, 1024, 16, 50257, 1024, 4)
_MIXED: dict[str, Any] = {"precision": "bf16-mixed"}
SETUPS = (
    Setup(_BERT),
    Setup(replace(_BERT, checkpointing=True)),
    Setup(_BERT_32, window=2, **_MIXED),
    Setup(_GPT2_MEDIUM, **_MIXED),
    Setup(_GPT2),
    Setup(_BERT_32, offload="optimizer", **_MIXED),
    Setup(_BERT_32, offload="parameters", **_MIXED),
    Setup(_GPT2_MEDIUM, ranks=4, partition_size=4, **_MIXED),
    Setup(_GPT2_MEDIUM, window=2, ranks=4, partition_size=4, rung="micro_step/sharded", **_MIXED),
    Setup(
        replace(_GPT2_MEDIUM, checkpointing=True), window=2, ranks=4, partition_size=2, rung="window/whole", **_MIXED
    ),
    Setup(_GPT2_MEDIUM, ranks=4, partition_size=2, optimizer_state="world", **_MIXED),
)
"""Several ways to fill memory: activations, logits, states; kept, recomputed, offloaded, sharded."""

_TINY_SETUPS = {name: (Setup(case), Setup(case, ranks=2, partition_size=2)) for name, case in TINY.items()}


# -- training ----------------------------------------------------------------------------------------------------------


class Training:
    """A setup under way on this rank. Collective on the default group."""

    def __init__(self, setup: Setup, device: torch.device, layers: int | None = None) -> None:
        self._window = setup.window
        self._batches = cycle(setup.case.batches(device))
        self._root: MiCSModule = shard(
            setup.build(device, layers),
            Groups.create(setup.topology, device.type, one_device.TIMEOUT),
            rung=setup.rung,
            activation_checkpointing=setup.case.checkpointing,
            precision=setup.of_precision,
            offload="parameters" if setup.offload == "parameters" else None,
        )
        self._root.one_backward = True
        self._optimizer = AdamW(self._root.parameters())
        if setup.optimizer_state == "world":
            self._root.shard_optimizer(self._optimizer)
        if setup.offload == "optimizer":
            step_on_host(self._optimizer)
        self._steps = 0

    def step(self) -> None:
        """An optimizer step."""
        batches = [*islice(self._batches, self._window)]
        one_device.optimizer_step(self._root, self._optimizer, loss_of, batches, self._steps)
        self._steps += 1


def take(setup: Setup, device: torch.device) -> Measured:
    """Train, and see what it takes, on this rank. Collective on the default group.

    At rest it has trained a few layers of the same, so that whatever is loaded or set up once is there.
    """
    Training(setup, device, _LAYERS_AT_REST).step()
    _rest(device)
    before = memory.in_use(device)
    training = Training(setup, device)
    training.step()
    _rest(device)
    memory.reset_peak(device)
    training.step()
    grown = memory.peak(device) - before
    reserved = 0 if device.type == "cpu" else torch.accelerator.max_memory_reserved(device)
    seconds = [] if setup.ranks > 1 else [_timed(training, device) for _ in range(_STEPS)]
    del training
    _rest(device)
    return Measured([grown], [reserved], seconds)


def _timed(training: Training, device: torch.device) -> float:
    start = time.perf_counter()
    training.step()
    one_device.wait(device)
    return time.perf_counter() - start


def _rest(device: torch.device) -> None:
    one_device.wait(device)
    one_device.clean(device)


def taken_by_ranks(setup: Setup, device: torch.device) -> Measured:
    """The same with processes of its own.

    Raises:
        Exception: if a rank raised.
    """
    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(_rank, (setup, device, place), nprocs=setup.ranks)
        told = [json.loads(Path(place, f"{rank}.json").read_text()) for rank in range(setup.ranks)]
    grown, reserved = ([each[name][0] for each in told] for name in ("grown", "reserved"))
    return Measured(grown, reserved, seconds=[])


def _rank(rank: int, setup: Setup, device: torch.device, place: str) -> None:
    torch.set_num_threads(1)
    with one_device.joined(rank, setup.ranks, "gloo", place):
        Path(place, f"{rank}.json").write_text(json.dumps(asdict(take(setup, device))))


# -- predicting --------------------------------------------------------------------------------------------------------


def figures_of(device: torch.device) -> dict[str, Device]:
    """What is known of the device, by source; its memory is all that there is of it."""
    found = {_TINY_BLOCK: measured.measure(device, 1)}
    entry = next((entry for part, entry in _IN_FILE.items() if part in one_device.name_of(device)), None)
    return found if entry is None else found | {"hardware file": hardware.devices()[entry]}


def with_its_block(setup: Setup, device: torch.device, figures: dict[str, Device]) -> dict[str, Device]:
    """The same, and those where a block of the model was timed."""
    if setup.ranks > 1:
        return figures
    work = setup.workload()
    block = BlockCall.of(work.module, work.batch(setup.case.batch), work.step, device, precision=work.precision)
    return {_ITS_BLOCK: measured.measure(device, 1, block)} | figures


def cluster_of(device: Device, ranks: int, device_type: str) -> Cluster:
    """One node; with one rank nothing is sent, so that its lines do not matter."""
    line = partial(Tier, bandwidth=1e11, latency=1e-5)
    backend = "gloo" if device_type == "cpu" else "nccl"
    return Cluster("one device", device, (line("intra-node", ranks), line("inter-node", 1)), backend)


def result_of(setup: Setup, took: Measured, figures: dict[str, Device], device_type: str) -> Result:
    """What the planner says, beside it."""
    rung, topology, batch = Rung.parse(setup.rung), setup.topology, setup.case.batch
    planner = Planner(setup.workload(), cluster_of(figures[_TINY_BLOCK], setup.ranks, device_type))
    held = planner.memory(topology, rung, batch, setup.window)
    seconds = {}
    for source, device in figures.items() if setup.ranks == 1 else ():
        compute, case = Compute(device), planner.case(topology, rung, setup.window)
        work = Work.of(planner.activations(batch), planner.state(topology), compute, setup.case.checkpointing)
        seconds[source] = simulate(planner.model, case, replace(planner.cluster, device=device), work, compute).seconds
    return Result(str(setup), took, held.total, held.moment, held.by_kind, figures, seconds)


# -- the command -------------------------------------------------------------------------------------------------------


@app.command()
def main(
    device: Annotated[str, typer.Option(help="By default the accelerator if there is one, else cpu.")] = "",
    case: Annotated[list[str] | None, typer.Option(help="Small ones, to try it out; by default the large.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Only setups of so many ranks.")] = None,
    commit: Annotated[str, typer.Option(help="What is measured, where there is no repository to ask.")] = "",
    folder: Annotated[Path | None, typer.Option(help="Where results go.")] = None,
    again: Annotated[Path | None, typer.Option(help="Results to predict once more.")] = None,
) -> None:
    """Train on one device, and compare with what the planner says."""
    if again is not None:
        console.print(table(predicted_again(again)))
        return
    here = one_device.chosen(device)
    setups = SETUPS if not case else [setup for each in case for setup in _TINY_SETUPS[each]]
    setups = [setup for setup in setups if ranks in (None, setup.ranks)]
    target = folder or _FOLDER / f"{date.today().isoformat()}-gpu-predicted"
    circumstances = about(device=one_device.name_of(here))
    circumstances["commit"] = commit or circumstances["commit"]
    backend = "cpu:gloo" if here.type == "cpu" else f"cpu:gloo,{here.type}:nccl"
    with tempfile.TemporaryDirectory() as place, one_device.joined(0, 1, backend, place):
        figures = figures_of(here)
        results = []
        for setup in setups:
            try:
                took = take(setup, here) if setup.ranks == 1 else taken_by_ranks(setup, here)
            except (RuntimeError, ValueError, torch.multiprocessing.ProcessRaisedException) as error:
                print(f"{setup}: {error}", file=sys.stderr, flush=True)
                continue  # the others have results of their own
            results.append(result_of(setup, took, with_its_block(setup, here, figures), here.type))
            console.print(table(results[-1:]))
            save(results, circumstances, target)
    console.print(table(results))
    console.print(f"results in {target}")
    if len(results) < len(setups):
        raise typer.Exit(1)


def predicted_again(folder: Path) -> list[Result]:
    """What was measured before, with what the planner says now of the same figures."""
    content = json.loads((folder / "predicted.json").read_text())
    if content["format"] != FORMAT:
        raise ValueError(f"{folder} is of format {content['format']}, and {FORMAT} is read; measure again")
    setups = {str(setup): setup for setup in (*SETUPS, *chain(*_TINY_SETUPS.values()))}
    device_type = "cuda" if content["about"]["options"]["device"] != "cpu" else "cpu"
    return [
        result_of(
            setups[each["setup"]],
            Measured(**each["measured"]),
            {source: Device(**device) for source, device in each["figures"].items()},
            device_type,
        )
        for each in content["results"]
    ]


def save(results: Sequence[Result], about: dict[str, Any], folder: Path) -> None:
    """Write everything to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "about": about, "results": [asdict(each) for each in results]}
    (folder / "predicted.json").write_text(json.dumps(content, indent=1) + "\n")


def table(results: Sequence[Result]) -> Table:
    """For people."""
    out = Table(title="One device, predicted beside measured", title_justify="left")
    sources = [*dict.fromkeys(source for each in results for source in each.seconds)]
    for name in ("setup", "GB", "measured", "error", "reserved", "s/step", *sources):
        out.add_column(name, justify="left" if name == "setup" else "right")
    for each in results:
        took = each.measured
        held = f"{each.bytes / 1e9:.2f}", f"{max(took.grown) / 1e9:.2f}", f"{each.memory_error:+.1%}"
        seconds = f"{median(took.seconds):.3f}" if took.seconds else ""
        said = [f"{each.seconds[s]:.3f} ({each.seconds_error(s):+.0%})" if s in each.seconds else "" for s in sources]
        out.add_row(each.setup, *held, f"{max(took.reserved) / 1e9:.2f}", seconds, *said)
    return out


if __name__ == "__main__":
    app()
