"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_mllm.common.svg import environment

_TITLES = {
    **{"items": "item summaries", "users": "user summaries", "sft": "SFT", "valid": "validation", "test": "test"},
    "full_ranking": "full ranking",
}
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
    rows = [["stage", *_COLUMNS.values(), "FLOPs", "time"]]
    for name, one in plan["stages"].items():
        counts = [f"{one[key]:,}" if key in ("prompts", "known") else number(one[key]) for key in _COLUMNS]
        rows.append([_TITLES[name], *counts, number(one["flops"]["total"]), duration(one["seconds"])])
    template = environment(Path(__file__).parent / "templates").get_template("plan.txt")
    text = template.render(
        plan=plan, stages=table(rows), titles=_TITLES, number=number, duration=duration, what_helps=what_helps
    )
    return text.rstrip()


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
