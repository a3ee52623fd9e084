"""MkDocs hooks: pages made from the code, so that nothing is written twice; no page loads anything from outside.

``commands.md``, ``keys.md`` and ``python.md`` hold a line ``<!-- generated: NAME -->``; one of `GENERATED` replaces it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PROPERTIES = ROOT / "properties"
COPIED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_OUTSIDE = re.compile(
    r"""<(?:script|img|iframe|source|audio|video|embed|link(?![^>]*rel="?(?:canonical|prev|next)))\b[^>]*?"""
    r"""\b(?:src|srcset|href)=["']?(?:https?:)?//[^"'>\s]+""",
    re.IGNORECASE,
)


# ---- what MkDocs calls


def on_config(config: Any) -> Any:
    """Add the published results, once there are pages of them."""
    pages = sorted((ROOT / "docs" / "results").glob("*.md"), key=lambda path: (path.name != "index.md", path.name))
    if pages:
        config.nav.insert(-2, {"Results": [f"results/{path.name}" for path in pages]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand beside docs/ in the repository."""
    for name, source in COPIED.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is generated, and fix links that leave docs/ or enter it from the repository's root."""
    name = page.file.src_uri
    folder = ROOT if name in COPIED else (ROOT / "docs" / name).parent
    markdown = re.sub(r"<!-- generated: (\w+) -->", lambda found: GENERATED[found[1]](), markdown)
    return _LINK.sub(lambda link: _mended(link, folder, len(Path(name).parts) - 1), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that loads a script, a style, a font or a picture from another host."""
    if found := _OUTSIDE.search(output):
        raise PluginError(f"{page.file.src_uri} loads from outside: {found[0]}")
    return output


def on_post_build(config: Any) -> None:
    """Refuse styles that load from another host."""
    for path in Path(config.site_dir).rglob("*.css"):
        if found := re.search(r"(?:@import\s*|url\()\s*[\"']?(?:https?:)?//[^)\s]+", path.read_text(encoding="utf-8")):
            raise PluginError(f"{path} loads from outside: {found[0]}")


def _mended(link: re.Match[str], folder: Path, depth: int) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    if "://" in target or target.startswith("mailto:"):
        return link[0]
    path = Path(os.path.normpath(folder / target))
    own = {ROOT / source: name for name, source in COPIED.items()}
    if path in own:
        return f"[{text}]({'../' * depth}{own[path]}{anchor})"
    if path.is_relative_to(PROPERTIES):
        return f"[{text}]({'../' * depth}keys.md)"
    if path.is_relative_to(ROOT / "docs"):
        return f"[{text}]({os.path.relpath(path, ROOT / 'docs' / '/'.join(['x'] * depth))}{anchor})"
    return text  # a file of the repository, of which the site has no page


# ---- what is generated


def commands() -> str:
    """Return every command's ``--help``."""
    from recbole_mllm.cli.main import COMMANDS
    from recbole_mllm.common.resources import converters

    names = [name for name in COMMANDS if name != "convert"]
    names = ["", "convert", *(f"convert {source}" for source in converters("options").SOURCES), *names]
    return "\n\n".join(f"## {('recbole-mllm ' + name).strip()}\n\n```text\n{_help(name)}\n```" for name in names)


def _help(name: str) -> str:
    from recbole_mllm.cli.main import main

    with redirect_stdout(io.StringIO()) as said, suppress(SystemExit), patch.dict(os.environ, COLUMNS="88"):
        main([*name.split(), "--help"])
    return said.getvalue().strip()


def keys() -> str:
    """Return the keys of this project as tables, then the files of presets and styles."""
    parts = [_table("model/MLLMMSR.yaml", "MLLMMSR"), _table("overall.yaml", "Every model")]
    for title, pattern in (
        ("Presets", "quick_start_config/*.yaml"),
        ("Prompt styles", "prompt/*.yaml"),
        ("Baselines", "baselines.yaml"),
        ("Devices of `plan`", "devices.yaml"),
        ("Launchers", "accelerate/*.yaml"),
        ("Search spaces of `--tune`", "tuning/*.yaml"),
    ):
        parts.append(f"## {title}")
        for path in sorted(PROPERTIES.glob(pattern)):
            text = path.read_text(encoding="utf-8").rstrip().replace("\n", "\n    ")
            parts.append(f'??? note "properties/{path.relative_to(PROPERTIES)}"\n\n    ```yaml\n    {text}\n    ```')
    return "\n\n".join(parts)


def _table(file: str, title: str) -> str:
    text = (PROPERTIES / file).read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    lines = [f"## {title}", "", f"In `properties/{file}`.", ""]
    for heading, rows in _sections(text):
        table = [f"| `{key}` | `{_cell(_flow(values[key]))}` | {_linked(_cell(text))} |" for key, text in rows]
        lines += [
            _linked(heading),
            "",
            *(["| key | default | meaning |", "|---|---|---|"] if table else []),
            *table,
            "",
        ]
    return "\n".join(lines)


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("\n...\n").strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _linked(text: str) -> str:
    return re.sub(r"docs/([\w-]+)\.md", r"[\1](\1.md)", text)


def _sections(text: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield each block of a YAML file: the comment at its head, and its top-level keys with their comments."""
    for block in re.split(r"\n\s*\n", text.strip()):
        heading: list[str] = []
        before: list[str] = []  # a comment on lines of its own, above a key
        rows: list[tuple[str, list[str]]] = []
        for line in block.splitlines():
            code, _, comment = (f" {line}").partition(" #")
            if key := re.match(r" (\w+):", code):
                rows.append((key[1], [*before, comment]))
                before = []
            elif code.strip() or not line.startswith("#"):
                rows[-1][1].append(comment)
            else:
                (before if rows else heading).append(comment)
        yield " ".join(map(str.strip, heading)), [(key, " ".join(" ".join(text).split())) for key, text in rows]


def python() -> str:
    """Return where mkdocstrings finds each public name of the package; the lazy ones are imported for that."""
    import recbole_mllm

    found = (getattr(recbole_mllm, name) for name in recbole_mllm.__all__)
    return "\n\n".join(f"::: {one.__module__}.{one.__qualname__}" for one in found if not isinstance(one, str))


GENERATED = {"commands": commands, "keys": keys, "python": python}
