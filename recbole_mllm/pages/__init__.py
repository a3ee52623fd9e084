"""What the HTML pages share: one look, and templates in which every text is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@cache
def environment(templates: Path) -> Environment:
    """Return the environment of the templates in `templates`, with ``style.css`` beside; each is compiled once."""
    loader = FileSystemLoader([templates, Path(__file__).parent])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
