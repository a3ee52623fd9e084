"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TITLES = {"items": "item summaries", "users": "user summaries", "sft": "SFT", "valid": "validation", "test": "test"}
_SIZES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COLUMNS = {
    "prompts": "prompts",
    "known": "known",
    "text_tokens": "text tok.",
    "image_tokens": "image tok.",
    "computed": "computed",
    "new_tokens": "written",
    "images": "images",
}


def format_plan(plan: dict[str, Any]) -> str:
    """Return the plan in tables of at most 100 columns, with what is assumed."""
    parts = [_models(plan), _stages(plan), _sharing(plan), _memory(plan), _disk(plan), _bill(plan)]
    parts += ["\n  ".join(["assumed:", *plan["assumptions"]]) if plan["assumptions"] else ""]
    return "\n\n".join(part for part in parts if part)


def number(value: float) -> str:
    """Return `value` with three digits and the letter of its size."""
    for size, letter in _SIZES:
        if value >= size:
            return f"{value / size:.3g}{letter}" if value < 1000 * size else f"{value / size:.0f}{letter}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Return seconds in the unit that suits them."""
    if seconds is None:
        return "–"
    for size, name in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.3g} s"


def _models(plan: dict[str, Any]) -> str:
    lines = [f"plan for {plan['dataset']}; nothing has been run or written"]
    for name, one in plan["models"].items():
        trained = f", {number(one['trained'])} trained" if one["trained"] else ""
        lines.append(
            f"{name}: {one['family']}, {number(one['parameters'])} parameters (vision {number(one['vision'])}, "
            f"projector {number(one['projector'])}, language {number(one['language'])}, "
            f"embeddings and head {number(one['embedding'] + one['head'])}){trained}"
        )
    return "\n".join(lines)


def _stages(plan: dict[str, Any]) -> str:
    rows = [["stage", *_COLUMNS.values(), "FLOPs", "time"]]
    for name, one in plan["stages"].items():
        counts = [f"{one[key]:,}" if key in ("prompts", "known") else number(one[key]) for key in _COLUMNS]
        rows.append([_TITLES[name], *counts, number(one["flops"]["total"]), duration(one["seconds"])])
    return table(rows)


def _sharing(plan: dict[str, Any]) -> str:
    lines = [
        f"  {_TITLES[name]} {number(one['alone'])} to {number(one['shared'])} tokens (x{one['saving']:.2f})"
        for name, one in plan["sharing"].items()
        if one["alone"]
    ]
    return "\n".join(["sharing prefixes on these very rows and candidates:", *lines]) if lines else ""


def _memory(plan: dict[str, Any]) -> str:
    lines = []
    for name, parts in plan["memory_bytes"].items():
        found = ", ".join(
            f"{part.replace('_', ' ')} {number(size)}B" for part, size in parts.items() if part != "total"
        )
        lines.append(f"  {_TITLES[name]:<15} {number(parts['total'])}B: {found}")
        fit = (plan["fits"] or {}).get(name)
        if fit and fit["processes"] != 1:
            each = f", {number(fit['bytes'])}B each" if fit["processes"] else ""
            helps = what_helps(name, fit["processes"])
            lines.append(f"  {'':<15} more than a {plan['device']}'s {number(fit['room'])}B: {helps}{each}")
    return "\n".join(["device memory:", *lines]) if lines else ""


def what_helps(stage: str, processes: int | None) -> str:
    """Return what to do about a stage that does not fit one device."""
    server = ", or a server writes instead" if stage in ("items", "users") else ""
    if processes:
        return f"fits when FSDP splits it among {processes} processes (docs/launching.md){server}"
    if server:
        return f"no split alone does it: a smaller summarize_batch_size takes less{server}"
    return "no split alone does it: gradient_checkpointing, a smaller micro_batch_size or finetune: lora take less"


def _disk(plan: dict[str, Any]) -> str:
    return "disk: " + ", ".join(f"{name.replace('_', ' ')} {number(n)}B" for name, n in plan["disk_bytes"].items())


def _bill(plan: dict[str, Any]) -> str:
    bill = plan["bill"]
    if bill is None:
        return "time: --device NAME (properties/devices.yaml) says how long it takes on a device"
    parts = [f"  {_TITLES[name]:<15} {duration(hours * 3600)}" for name, hours in bill["hours"].items()]
    price = f", price {bill['price']:,.2f}" if bill["price"] is not None else ""
    hours = f"{duration(bill['wall_hours'] * 3600)}, {number(bill['device_hours'])} device hours"
    return "\n".join([f"time on {bill['workers']} x {plan['device']}: {hours}{price}", *parts])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return `rows`, the first of which has the names, in columns, the first on the left and numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])
