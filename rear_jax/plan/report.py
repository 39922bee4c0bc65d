"""A plan as tables, for people, and as numbers, for programs."""

import dataclasses
from collections import defaultdict
from typing import Any

from ml_collections import ConfigDict

from rear_jax.plan.chips import GIB
from rear_jax.plan.hlo import Collective
from rear_jax.plan.roofline import Plan
from rear_jax.runtime.figures import table
from rear_jax.runtime.flops import HALF
from rear_jax.training import fitting

NAMES = {
    "tokenizer": "step",
    "train": "step",
    "posttrain": "step",
    "caption": "batch",
    "sample": "batch",
}  # of one call


def markdown(plan: Plan, config: ConfigDict, largest: tuple[int, int | None] | None) -> str:
    """The whole plan of one program; `largest` as `roofline.largest_batch` returns it, None where none was sought."""
    count, axes = len(plan.topology.devices), ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    sections = [
        f"## {plan.name} on {plan.topology.name}: {count} chip(s), {axes}",
        " ".join((f"Compiled by {plan.topology.compiler}; {plan.seconds:.0f} s.", *plan.notes, *chosen(plan, config))),
        table(("memory of a chip", "GiB"), memory(plan)),
        verdict(plan, largest),
        table((f"a {NAMES[plan.name]}", ""), work(plan)),
    ]
    if plan.collectives:
        header = ("collective", "chips", "times", "GB in all", "GB sent by a chip")
        sections.append(table(header, traffic(plan.collectives)))
    beyond = ", beyond the bound" if plan.seconds_at(config.plan.mfu) < plan.bound else ""
    modelled = () if plan.modelled is None else ("by the cost model",)
    header = ("the recipe", "at the bound", *modelled, f"at an MFU of {100 * config.plan.mfu:.0f} %{beyond}")
    sections.append(table(header, recipe(plan, config)))
    return "\n\n".join(sections) + "\n"


def chosen(plan: Plan, config: ConfigDict) -> tuple[str, ...]:
    """A sentence about what the config leaves to be chosen; none where it does not."""
    if plan.name not in fitting.JOBS or not fitting.is_open(config, plan.name):
        return ()
    choice = fitting.Choice(plan.accumulation, plan.remat)
    within = f"to stay within {100 * fitting.USED:.0f} % of the memory"
    return (f"**Chosen as a run does, {within}: {choice}.**",)


def memory(plan: Plan) -> list[tuple[str, ...]]:
    """Rows: what takes how much."""
    rows = [(what, f"{size / GIB:.2f}") for what, size in plan.held.items()]
    rows.append(("activations, gradients, and what else comes and goes", f"{plan.working / GIB:.2f}"))
    return [*rows, ("**all**", f"**{plan.memory / GIB:.2f}** of {plan.topology.chip.memory / GIB:.2f}")]


def verdict(plan: Plan, largest: tuple[int, int | None] | None) -> str:
    """Whether it fits, how large a batch would, and what to do."""
    unit = f"{NAMES[plan.name]} of {plan.images} {_unit(plan)}s"
    said = f"A {unit} fits." if plan.fits else f"**A {unit} does not fit.**"
    if largest is not None:
        largest_fitting, failing = largest
        said += f" The largest that was found to fit: {largest_fitting or 'none'}"
        said += f"; {failing} does not." if failing else "; none was too large."
    if not plan.fits:
        own = f"more {plan.name}.accumulation, model.remat, " if plan.name in fitting.JOBS else ""
        said += f" What helps: {own}config.mesh.fsdp, a smaller batch, more chips."
    return said


def work(plan: Plan) -> list[tuple[str, ...]]:
    """Rows: what one call computes and moves, and the least time of each."""
    chips, bounds = len(plan.topology.devices), plan.bounds
    rows = [
        (f"{_unit(plan)}s", f"{plan.images}, {plan.images / chips:g} a chip"),
        ("model FLOPs", f"{plan.model_flops:.3g}, {plan.model_flops / plan.images:.3g} for each {_unit(plan)}"),
        ("FLOPs with recomputation", f"{sum(plan.flops.values()):.3g}: {seconds(bounds['compute'])}"),
        *((f"of them {_named(kind)}", f"{operations:.3g}") for kind, operations in sorted(plan.flops.items())),
    ]
    if plan.moved is not None:
        sent = sum(collective.sent for collective in plan.collectives)
        rows += [
            ("through the memory of a chip", f"{plan.moved / 1e9:.3g} GB: {seconds(bounds['memory'])}"),
            ("sent by a chip", f"{sent / 1e9:.3g} GB: {seconds(bounds['network'])}"),
        ]
    slowest = max(bounds, key=bounds.get)
    rows.append(("**bound**", f"{seconds(plan.bound)}, by {slowest}: an MFU of {100 * plan.mfu(plan.bound):.1f} %"))
    if plan.modelled is not None:
        own = plan.kernel_cycles / plan.topology.chip.clock
        kernels = f", of which kernels {seconds(own)} by their formulas" if own else ""
        mfu = f"an MFU of {100 * plan.mfu(plan.modelled):.1f} %"
        rows.append(("by the compiler's cost model", f"{seconds(plan.modelled)}{kernels}: {mfu}"))
    return rows


def _unit(plan: Plan) -> str:
    """What a program works on."""
    return "caption" if plan.name == "caption" else "image"


def _named(kind: str) -> str:
    return kind if kind == HALF else f"float32 at precision '{kind}'"


def traffic(collectives: list[Collective]) -> list[tuple[str, ...]]:
    """Rows: collectives of one kind over equally many chips together."""
    kinds = defaultdict(list)
    for collective in collectives:
        kinds[collective.kind, collective.group].append(collective)
    return [
        (
            kind,
            str(group),
            str(sum(one.times for one in same)),
            f"{sum(one.times * one.size for one in same) / 1e9:.3g}",
            f"{sum(one.sent for one in same) / 1e9:.3g}",
        )
        for (kind, group), same in sorted(kinds.items())
    ]


def recipe(plan: Plan, config: ConfigDict) -> list[tuple[str, ...]]:
    """Rows: what the config's whole recipe takes, at the bound, by the cost model, and at a stated utilisation."""
    times = [plan.bound, plan.modelled, plan.seconds_at(config.plan.mfu)]
    times = [time for time in times if time is not None]
    chips = len(plan.topology.devices)
    rows = [
        (f"a {NAMES[plan.name]}", *map(seconds, times)),
        (f"{_unit(plan)}s/s", *(f"{plan.images / t:.4g}" for t in times)),
    ]
    if NAMES[plan.name] == "step":
        epoch = config.plan.epoch_images / plan.images
        rows.append(("epochs a day", *(f"{86400 / t / epoch:.3g}" for t in times)))
    return [
        *rows,
        (f"{plan.calls} of them, hours", *(f"{plan.calls * t / 3600:.3g}" for t in times)),
        ("chip-hours", *(f"{plan.calls * t * chips / 3600:.4g}" for t in times)),
    ]


def numbers(plan: Plan, largest: tuple[int, int | None] | None) -> dict[str, Any]:
    """The same for `plan.json`."""
    topology = {"name": plan.topology.name, "chips": len(plan.topology.devices), "compiler": plan.topology.compiler}
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    derived = {"bounds": plan.bounds, "bound": plan.bound, "mfu_bound": plan.mfu(plan.bound), "largest_batch": largest}
    derived |= {"modelled": plan.modelled, "mfu_modelled": plan.modelled and plan.mfu(plan.modelled)}
    collectives = [dataclasses.asdict(one) | {"sent": one.sent} for one in plan.collectives]
    return fields | derived | {"topology": topology, "collectives": collectives}


def seconds(time: float) -> str:
    """A duration in the unit that suits it."""
    return f"{time:.3g} s" if time >= 1 else f"{1e3 * time:.3g} ms"
