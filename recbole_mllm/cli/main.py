"""The words of the command line: one table from each command to its options and the function that does it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from recbole_mllm import launched, ranks
from recbole_mllm.benchmark.variants import SETS, known_variants
from recbole_mllm.cli import benchmark_commands, commands, store_commands
from recbole_mllm.cli.arguments import Options, read_overrides
from recbole_mllm.common.console import Parser, exit_code
from recbole_mllm.errors import UserError

_DESCRIPTION = "MLLM-MSR for RecBole. Without arguments: the demo."
_EPILOG = "Any configuration key may follow as --key=value. Exit code 2 means a mistake in what was given."


@dataclass(frozen=True, slots=True)
class Option:
    """An option or a positional argument, as argparse's ``add_argument`` takes it."""

    names: tuple[str, ...]
    settings: dict[str, Any]


def _option(*names: str, **settings: Any) -> Option:
    return Option(names, settings)


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Args:
        help: One line.
        run: Does it; gets what argparse has read, and the configuration keys beside it.
        options: Its own; those in `_COMMON` come on top of them where it is `configured`.
        configured: Whether it reads a run's configuration.
        keys: Whether ``--key=value`` may follow.
        shared: Whether several processes have something to share in it; else the main one does it alone.
    """

    help: str
    run: Callable[[argparse.Namespace, Options], int]
    options: tuple[Option, ...] = ()
    configured: bool = False
    keys: bool = True
    shared: bool = False


_COMMON = (
    _option("--dataset", help="a folder name under data_path (default ./dataset)"),
    _option("--config_files", help="YAML files or preset names, separated by spaces"),
    _option("--limit_users", type=int, help="evaluate a seeded sample of this many users"),
    _option("--image_dir", help="images by item id, where .item has no image column"),
    _option("--seed", type=int, help="the run's seed; without a command: also the demo world's"),
)
_EMBED_IMAGES = _option(
    "--embed_images", choices=("on", "off"), default="on", help="thumbnails in the report's case studies"
)
_STORE_OF = _option("where", metavar="D", help="a dataset's folder, or its name under ./dataset")
_ANSWERS_OF = _option("--model", help="only this model's, as stats names it; * and ? match any characters")

GROUPS = {
    "candidates": ("the frozen candidates as a file; import them with --candidates_file=FILE", "{export}"),
    "store": ("the summary store: stats, prune, export, import", "{stats,prune,export,import}"),
}
"""Commands of two words: the help of the first, and how the second is shown."""

COMMANDS = {
    "convert": Command("raw dump to atomic files; see convert --help", commands.convert),
    "summarize": Command(
        "make the summaries alone; resumable",
        commands.summarize,
        (
            _option("--stage", choices=("items", "users", "all"), default="all"),
            _option("--dry-run", action="store_true", help="only say how many prompts, tokens and how long"),
            _option(
                "--since", metavar="WHEN", help="users with an interaction at or after this date or timestamp alone"
            ),
        ),
        configured=True,
        shared=True,
    ),
    "plan": Command(
        "what a run would cost, before it runs",
        commands.plan,
        (
            _option("--device", metavar="NAME", help="hours on a device of properties/devices.yaml, e.g. H100"),
            _option("--probe", action="store_true", help="hours on this machine: load the model and time a little"),
            _option("--nodes", type=int, default=1, metavar="N", help="split the work over N nodes"),
            _option("--devices_per_node", type=int, metavar="N", help="default: 8, on one node 1"),
            _option("--price_per_hour", type=float, metavar="X", help="of one device"),
            _option("--requests_per_s", type=float, metavar="X", help="of all servers, where models are behind some"),
            _option("--json", metavar="PATH", help="also write the plan as JSON (docs/plan.md)"),
        ),
        configured=True,
    ),
    "benchmark": Command(
        "many models, same candidates, one leaderboard",
        benchmark_commands.benchmark,
        (
            _option(
                "--models",
                required=True,
                help=f"RecBole's by name, MLLMMSR, {known_variants()}; or sets of them: {', '.join(SETS)}",
            ),
            _option("--seeds", help="e.g. 2024,2025; default: --seed, else 2024"),
            _option("--output_dir", help="default: results/<dataset>"),
            _option("--force", action="store_true", help="run again what is finished"),
            _option("--jobs", type=int, default=1, help="runs at a time"),
            _option("--quick", action="store_true", help="baselines train for a few epochs: a first look, marked"),
            _option("--tune", type=int, default=0, metavar="N", help="configurations each model may try first"),
            _EMBED_IMAGES,
        ),
        configured=True,
        shared=True,
    ),
    "inspect": Command(
        "a dataset's health, as text and as a page",
        commands.inspect,
        (
            _option("directory", help="a dataset's folder, or its name under data_path (default ./dataset)"),
            _option("--image_dir", default=argparse.SUPPRESS, help="images by item id"),
            _option("--config_files", default=argparse.SUPPRESS, help="YAML files that name the dataset's fields"),
            _option("--output", help="the page's file; default: inspect.html in the dataset's folder"),
        ),
    ),
    "report": Command(
        "render leaderboard.* again from runs.jsonl", benchmark_commands.report, (_option("directory"), _EMBED_IMAGES)
    ),
    "candidates export": Command(
        "write them as JSON lines",
        commands.export_candidates,
        (_option("--out", required=True, metavar="FILE", help="FILE.jsonl or FILE.jsonl.gz"),),
        configured=True,
    ),
    "rerun": Command(
        "repeat a recorded run and compare: exit code 0 if the numbers agree, 1 if not",
        benchmark_commands.rerun,
        (
            _option("run_id", help="as in runs.jsonl"),
            _option("--output_dir", help="the benchmark's; default: the one below results/ that has the run"),
        ),
    ),
    "export": Command(
        "a fine-tuned model as a folder that servers load (docs/servers.md)",
        commands.export,
        (
            _option("run", metavar="RUN", help="a checkpoint (FILE.pth), a run's folder, or its id under results/"),
            _option("--out", required=True, metavar="DIR", help="the folder to write; an earlier export is replaced"),
            _option("--merge", action="store_true", help="merge the adapter, so that the folder stands alone"),
        ),
        keys=False,
    ),
    "store stats": Command(
        "answers, tokens and seconds by model, kind of prompt and origin",
        store_commands.stats,
        (_STORE_OF,),
        keys=False,
    ),
    "store prune": Command(
        "delete answers",
        store_commands.prune,
        (
            _option("--older-than", type=float, metavar="DAYS", help="only those written longer ago"),
            _option("--dry-run", action="store_true", help="only say what would go"),
            _ANSWERS_OF,
            _STORE_OF,
        ),
        keys=False,
    ),
    "store export": Command(
        "write the answers as JSON lines",
        store_commands.export,
        (_option("--out", required=True, metavar="FILE", help="FILE.jsonl or FILE.jsonl.gz"), _ANSWERS_OF, _STORE_OF),
        keys=False,
    ),
    "store import": Command(
        "add the answers of an exported file; known ones stay",
        store_commands.import_file,
        (
            _STORE_OF,
            _option("file", help="what `store export` wrote"),
            _option("--origin", help="what marks the answers, e.g. the paper; default: the file's name"),
        ),
        keys=False,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for a user's mistake (one line, no traceback), 1 otherwise."""
    # Threads that spin while they wait slow each other down several times over on a busy machine; read when torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = sys.argv[1:] if argv is None else argv
    try:
        ends = launched.exit_code if ranks.is_launched() else exit_code
    except UserError as error:
        return exit_code(partial(_refuse, error), words)
    return ends(_run, words)


def _refuse(error: UserError, words: Sequence[str]) -> int:
    raise error


def _run(words: list[str]) -> int:
    if not ranks.is_main() and ({"-h", "--help"} & set(words) or words[:1] == ["convert"]):
        return 0
    if words[:1] == ["convert"]:  # has a parser of its own, and needs nothing of what follows
        return commands.convert(argparse.Namespace(words=words[1:]), Options())
    parser = _parser()
    known, rest = _read(words, parser)
    name = " ".join(filter(None, (known.command, getattr(known, "action", None))))
    command = COMMANDS[name] if name else Command("", _run_model if known.model else _run_demo, shared=True)
    if not command.shared and not ranks.is_main():
        return 0
    if rest and not command.keys:
        raise UserError(f"{known.command} takes no {rest[0]!r}; see --help")
    given = {key: getattr(known, key, None) for key in ("limit_users", "image_dir")}
    overrides = read_overrides(rest) | {key: value for key, value in given.items() if value is not None}
    return command.run(known, Options(overrides, tuple(str(known.config_files or "").split()), known.seed))


def _run_model(known: argparse.Namespace, options: Options) -> int:
    return commands.run_model(known, options)


def _run_demo(known: argparse.Namespace, options: Options) -> int:
    if known.dataset:
        raise UserError("--dataset without --model: add --model MLLMMSR, or use the commands benchmark or summarize")
    return benchmark_commands.demo(options)


def _read(words: Sequence[str], parser: Parser) -> tuple[argparse.Namespace, list[str]]:
    """Return what `parser` reads of `words`, and the rest of them.

    argparse takes ``--key=value`` with a space in it for no option, so those of the configuration are held back.
    """
    options = {option for one in _parsers(parser) for option in one._option_string_actions}
    ours = [word for word in words if word.startswith("--") and "=" in word and word.partition("=")[0] not in options]
    known, rest = parser.parse_known_args([word for word in words if word not in ours])
    return known, rest + ours


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        for command in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            yield from _parsers(command)


def _parser() -> Parser:
    parser = Parser(prog="recbole-mllm", description=_DESCRIPTION, epilog=_EPILOG)
    _add(parser, _COMMON)
    parser.add_argument("--model", help="a RecBole model or MLLMMSR")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    shown = "{convert,inspect,plan,summarize,store,candidates,benchmark,report,rerun,export}"
    first = parser.add_subparsers(dest="command", metavar=shown, parser_class=Parser)
    second: dict[str, Any] = {}
    for name, command in COMMANDS.items():
        group, _, action = name.rpartition(" ")
        if group and group not in second:
            told, actions = GROUPS[group]
            second[group] = first.add_parser(group, help=told).add_subparsers(
                dest="action", metavar=actions, required=True, parser_class=Parser
            )
        one = second.get(group, first).add_parser(
            action, help=command.help, epilog=_EPILOG if command.configured else None
        )
        for option in _COMMON if command.configured else ():  # what stood before the command is not overwritten
            one.add_argument(*option.names, default=argparse.SUPPRESS, **option.settings)
        _add(one, command.options)
    return parser


def _add(parser: Parser, options: Sequence[Option]) -> None:
    for option in options:
        parser.add_argument(*option.names, **option.settings)


if __name__ == "__main__":
    sys.exit(main())
