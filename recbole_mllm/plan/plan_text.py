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
    head = [f"plan for {plan['dataset']}; nothing has been run or written"]
    for name, one in plan["models"].items():
        trained = f", {number(one['trained'])} trained" if one["trained"] else ""
        head.append(
            f"{name}: {one['family']}, {number(one['parameters'])} parameters (vision {number(one['vision'])}, "
            f"projector {number(one['projector'])}, language {number(one['language'])}, "
            f"embeddings and head {number(one['embedding'] + one['head'])}){trained}"
        )
    rows = [["stage", *_COLUMNS.values(), "FLOPs", "time"]]
    for name, one in plan["stages"].items():
        counts = [f"{one[key]:,}" if key in ("prompts", "known") else number(one[key]) for key in _COLUMNS]
        rows.append([_TITLES[name], *counts, number(one["flops"]["total"]), duration(one["seconds"])])
    sharing = [
        f"{_TITLES[name]} {number(one['alone'])} to {number(one['shared'])} tokens (x{one['saving']:.2f})"
        for name, one in plan["sharing"].items()
        if one["alone"]
    ]
    time = "time: --device NAME (properties/devices.yaml) says how long it takes on a device"
    hours: list[str] = []
    if bill := plan["bill"]:
        price = f", price {bill['price']:,.2f}" if bill["price"] is not None else ""
        whole = f"{duration(bill['wall_hours'] * 3600)}, {number(bill['device_hours'])} device hours"
        time = f"time on {bill['workers']} x {plan['device']}: {whole}{price}"
        hours = [f"{_TITLES[name]:<15} {duration(spent * 3600)}" for name, spent in bill["hours"].items()]
    disk = ", ".join(f"{name.replace('_', ' ')} {number(n)}B" for name, n in plan["disk_bytes"].items())
    parts = [
        "\n".join(head),
        table(rows),
        _listed("sharing prefixes on these very rows and candidates:", sharing),
        _listed("device memory:", _memory(plan)),
        f"disk: {disk}",
        "\n  ".join([time, *hours]),
        _listed("assumed:", plan["assumptions"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _listed(title: str, lines: Sequence[str]) -> str:
    return "\n  ".join([title, *lines]) if lines else ""


def _memory(plan: dict[str, Any]) -> list[str]:
    lines = []
    for name, parts in plan["memory_bytes"].items():
        found = (f"{part.replace('_', ' ')} {number(size)}B" for part, size in parts.items() if part != "total")
        lines.append(f"{_TITLES[name]:<15} {number(parts['total'])}B: {', '.join(found)}")
        fit = (plan["fits"] or {}).get(name)
        if fit and fit["processes"] != 1:
            each = f", {number(fit['bytes'])}B each" if fit["processes"] else ""
            helps = what_helps(name, fit["processes"])
            lines.append(f"{'':<15} more than a {plan['device']}'s {number(fit['room'])}B: {helps}{each}")
    return lines


def what_helps(stage: str, processes: int | None) -> str:
    """Return what to do about a stage that does not fit one device."""
    server = ", or a server writes instead" if stage in ("items", "users") else ""
    if processes:
        return f"fits when FSDP splits it among {processes} processes (docs/launching.md){server}"
    if server:
        return f"no split alone does it: a smaller summarize_batch_size takes less{server}"
    return "no split alone does it: gradient_checkpointing, a smaller micro_batch_size or finetune: lora take less"


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


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return `rows`, the first of which has the names, in columns, the first on the left and numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    lines = [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])
