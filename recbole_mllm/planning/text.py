"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recbole_mllm.planning.fitting import what_helps

_TITLES = {
    "items": "item summaries",
    "users": "user summaries",
    "sft": "SFT",
    "valid": "validation",
    "test": "test",
}
_SIZES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_plan(plan: dict[str, Any]) -> str:
    """Return the plan in tables of at most 100 columns, with what is assumed."""
    parts = [_models(plan), _stages(plan), _sharing(plan), _memory(plan), _disk(plan), _bill(plan)]
    parts.append("assumed:\n" + "\n".join(f"  {line}" for line in plan["assumptions"]) if plan["assumptions"] else "")
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
    names = ("stage", "prompts", "known", "text tok.", "image tok.", "computed", "written", "images", "FLOPs", "time")
    rows = [
        [
            _TITLES[name],
            f"{one['prompts']:,}",
            f"{one['known']:,}",
            *(number(one[key]) for key in ("text_tokens", "image_tokens", "computed", "new_tokens", "images")),
            number(one["flops"]["total"]),
            duration(one["seconds"]),
        ]
        for name, one in plan["stages"].items()
    ]
    return table(names, rows)


def _sharing(plan: dict[str, Any]) -> str:
    told = [
        f"{_TITLES[name]} {number(one['alone'])} to {number(one['shared'])} tokens (x{one['saving']:.2f})"
        for name, one in plan["sharing"].items()
        if one["alone"]
    ]
    return "sharing prefixes on these very rows and candidates:\n  " + "\n  ".join(told) if told else ""


def _memory(plan: dict[str, Any]) -> str:
    lines = []
    for name, parts in plan["memory_bytes"].items():
        told = ", ".join(f"{part.replace('_', ' ')} {number(size)}B" for part, size in parts.items() if part != "total")
        lines.append(f"  {_TITLES[name]:<15} {number(parts['total'])}B: {told}")
        lines += _too_much(plan, name)
    return "device memory:\n" + "\n".join(lines) if lines else ""


def _too_much(plan: dict[str, Any], stage: str) -> list[str]:
    found = (plan["fits"] or {}).get(stage)
    if found is None or found["processes"] == 1:
        return []
    says = what_helps(stage, found["processes"])
    each = f", {number(found['bytes'])}B each" if found["processes"] else ""
    return [f"  {'':<15} more than a {plan['device']}'s {number(found['room'])}B: {says}{each}"]


def _disk(plan: dict[str, Any]) -> str:
    told = ", ".join(f"{name.replace('_', ' ')} {number(size)}B" for name, size in plan["disk_bytes"].items())
    return f"disk: {told}"


def _bill(plan: dict[str, Any]) -> str:
    bill = plan["bill"]
    if bill is None:
        return "time: --device NAME (properties/devices.yaml) prices a device, --probe measures this machine"
    parts = "\n".join(f"  {_TITLES[name]:<15} {duration(hours * 3600)}" for name, hours in bill["hours"].items())
    where = f" on {bill['workers']} x {plan['device'] or 'this machine'}"
    price = f", price {bill['price']:,.2f}" if bill["price"] is not None else ""
    hours = f"{duration(bill['wall_hours'] * 3600)}, {number(bill['device_hours'])} device hours"
    return f"time{where}: {hours}{price}\n{parts}"


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns, the first on the left and numbers on the right."""
    widths = [max(len(row[n]) for row in (names, *rows)) for n in range(len(names))]
    lines = [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (names, *rows)
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])
