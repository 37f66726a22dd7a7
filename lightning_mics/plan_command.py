"""`mics plan`: which partition size, rung and micro-batch to take on a cluster, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_mics.plan_arguments import Arguments
from lightning_mics.planner.plan import Choice, Plan, Planner, size
from lightning_mics.planner.schedule import Kind
from lightning_mics.planner.timeline import hidden
from lightning_mics.workloads import question

_UNSEEN_WIDTH = 160  # columns where nobody looks at a terminal


def run(words: Sequence[str], *, config_dir: Path, as_json: bool = False, plots: Path | None = None) -> None:
    """Plan what was asked, and show it.

    Args:
        words: see `Arguments`.
        config_dir: the folder of configurations.
        as_json: print one JSON object and nothing else.
        plots: a folder for pictures and the step's trace, made if there is none.

    Raises:
        ValueError: for what cannot be planned; `DoesNotFit` where there is no room.
        ImportError: where an optional package is missing.
    """
    arguments = Arguments.parse(words)
    if plots is not None:
        from lightning_mics.planner import pictures
    asked = question(arguments, config_dir)
    planner = asked.planner
    plan = planner.plan(
        global_batch=asked.batch,
        micro_batch=asked.micro_batch,
        window=asked.window,
        partition_size=arguments.partition_size,
        rung=arguments.rung,
    )
    if as_json:
        print(json.dumps(as_dict(planner, plan), indent=2))
    else:
        console = console_for_tables()
        console.print(table(planner, plan))
        console.print(why(planner, plan))
    if plots is not None:
        written = pictures.plan(plan, plots)
        if not as_json:
            console.print(f"written to {plots}: {', '.join(written)}", soft_wrap=True)


def console_for_tables() -> Console:
    """As wide as the terminal; wide enough for a table where there is none."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=_UNSEEN_WIDTH)


def table(planner: Planner, plan: Plan) -> Table:
    """A row for each partition size, the chosen one first."""
    cluster = planner.cluster
    title = f"{cluster.name}, {cluster.nodes} x {cluster.devices_per_node} {cluster.device.name}"
    memory = f"memory\nof {size(plan.budget)}"
    batch = "micro-batch\nx window"
    made = Table("p", memory, "of it", "rung", batch, "s/step", "samples/s", "TFLOPS\n/GPU", "gathers", title=title)
    rest = [each for each in plan.considered if each.partition_size != plan.best.partition_size]
    for choice in (plan.best, *rest):
        made.add_row(*_cells(planner, choice), style="bold" if choice is plan.best else None)
    return made


def _cells(planner: Planner, choice: Choice) -> list[str]:
    memory = choice.memory
    cells = [str(choice.partition_size), size(memory.total), _kinds(memory.by_kind)]
    if not choice.fits:
        return [*cells, "", "", "does not fit"]
    cells += [str(choice.rung), f"{choice.micro_batch} x {choice.window}"]
    if choice.step is None:
        return [*cells, "not simulated"]
    samples, flops = planner.throughput(choice.micro_batch, choice.window, choice.seconds)
    return [*cells, f"{choice.seconds:.3g}", f"{samples:,.4g}", f"{flops / 1e12:.3g}", choice.collective]


def _kinds(by_kind: dict[str, int]) -> str:
    """In short: the largest two."""
    largest = sorted(by_kind.items(), key=lambda each: -each[1])[:2]
    return ", ".join(f"{100 * part / sum(by_kind.values()):.0f} % {name}" for name, part in largest)


def why(planner: Planner, plan: Plan) -> str:
    """A sentence: how the chosen partition size compares, and what the step's time goes to."""
    best = plan.best
    assert best.step is not None
    fitting = [each for each in plan.considered if each.fits]
    smallest = fitting[0]
    if len(fitting) == 1:
        reason = "the only one that fits" if len(plan.considered) > 1 else "as asked for"
    elif best is smallest:
        reason = "the smallest that fits, and no other is more than 2 % faster"
    else:
        saved = 100 * (1 - best.seconds / smallest.seconds)
        reason = f"its step is {saved:.1f} % shorter than that of p={smallest.partition_size}, the smallest that fits"
    return (
        f"p={best.partition_size}: {reason}; {100 * best.step.computing / best.seconds:.0f} % of the step is computing"
        + "".join(f"; {said}" for said in _communication(planner, best))
    )


def _communication(planner: Planner, best: Choice) -> list[str]:
    topology = planner.topology(best.partition_size)
    assert best.step is not None
    said = []
    if best.partition_size == 1:
        said.append("nothing is gathered")
    else:
        said.append(
            f"gathers are {best.collective}, {100 * hidden(best.step, Kind.GATHER):.0f} % of them hidden behind it"
        )
    if topology.replicas == 1:
        said.append("with one replica there is no hop 2")
    else:
        said.append(f"hop 2 is {100 * hidden(best.step, Kind.HOP_2):.0f} % hidden")
    return said


def as_dict(planner: Planner, plan: Plan) -> dict[str, Any]:
    """What `--json` prints: bytes, seconds, samples and floating-point operations a second."""
    cluster, work = planner.cluster, planner.workload
    return {
        "cluster": cluster.name,
        "nodes": cluster.nodes,
        "devices_per_node": cluster.devices_per_node,
        "device": cluster.device.name,
        "parameters": sum(param.numel() for param in work.module.parameters()),
        "activation_checkpointing": work.activation_checkpointing,
        "optimizer_state": str(work.optimizer_state),
        "offload": None if work.offload is None else str(work.offload),
        "global_batch": cluster.devices * plan.best.micro_batch * plan.best.window,
        "memory_budget": plan.budget,
        "chosen": _choice(planner, plan.best),
        "considered": [_choice(planner, each) for each in plan.considered],
        "why": why(planner, plan),
    }


def _choice(planner: Planner, choice: Choice) -> dict[str, Any]:
    told: dict[str, Any] = {
        "partition_size": choice.partition_size,
        "fits": choice.fits,
        "memory": {"total": choice.memory.total, "moment": choice.memory.moment, **choice.memory.by_kind},
        "host_memory": planner.state(planner.topology(choice.partition_size)).host,
        "rung": str(choice.rung),
        "micro_batch": choice.micro_batch,
        "window": choice.window,
    }
    if choice.step is None:
        return told
    samples, flops = planner.throughput(choice.micro_batch, choice.window, choice.seconds)
    return told | {
        "gathers": choice.collective,
        "seconds": choice.seconds,
        "computing": choice.step.computing,
        "samples_per_second": samples,
        "flops_per_second": flops,
    }
