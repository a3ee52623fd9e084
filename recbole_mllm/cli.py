"""The command line: ``python run_recbole_mllm.py …`` and ``recbole-mllm …`` are this."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import Any

import yaml

from recbole_mllm import launched, ranks, store_commands
from recbole_mllm.arguments import Parser, exit_code
from recbole_mllm.errors import UserError
from recbole_mllm.resources import converters

_DESCRIPTION = "MLLM-MSR for RecBole. Without arguments: the demo."
_EPILOG = "Any configuration key may follow as --key=value. Exit code 2 means a mistake in what was given."

_SHARED = {None, "summarize", "benchmark"}  # commands that several processes have something to share in


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for a user's mistake (one line, no traceback), 1 otherwise."""
    # Threads that spin while they wait slow each other down several times over on a busy machine; read when torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = sys.argv[1:] if argv is None else argv
    try:
        ends = launched.exit_code if ranks.is_launched() else exit_code
    except UserError as error:
        return exit_code(partial(_complain, error), words)
    return ends(_run, words)


def _complain(error: UserError, words: Sequence[str]) -> int:
    raise error


def _run(words: list[str]) -> int:
    if not ranks.is_main() and ({"-h", "--help"} & set(words) or words[:1] == ["convert"]):
        return 0
    if words[:1] == ["convert"]:
        return int(converters("options").main(words[1:]))  # without torch, pandas or RecBole
    from recbole_mllm import benchmark_commands, commands
    from recbole_mllm.options import Options

    parser = _parser()
    known, rest = parser.parse_known_args([word for word in words if not _is_setting(word, parser)])
    rest += [word for word in words if _is_setting(word, parser)]
    if known.command not in _SHARED and not ranks.is_main():
        return 0
    if known.command == "store":
        if rest:
            raise UserError(f"store takes no {rest[0]!r}; see --help")
        return store_commands.run(known)
    options = Options(
        overrides=_overrides(rest)
        | {k: v for k in ("limit_users", "image_dir") if (v := getattr(known, k)) is not None},
        config_files=tuple(str(known.config_files or "").split()),
        seed=known.seed,
        embed_images=getattr(known, "embed_images", "on") == "on",
        quick=getattr(known, "quick", False),
    )
    if known.command == "summarize":
        return commands.summarize(_dataset(known), known.stage, known.dry_run, known.since, options)
    if known.command == "plan":
        return commands.plan(_dataset(known), known.json, _plan_request(known), options)
    if known.command == "benchmark":
        return benchmark_commands.benchmark(
            _dataset(known), known.models, known.seeds, known.output_dir, known.jobs, known.force, options, known.tune
        )
    if known.command == "inspect":
        return commands.inspect(known.directory, known.output, options)
    if known.command == "export":
        if rest:
            raise UserError(f"export takes no {rest[0]!r}; see --help")
        return commands.export(known.run, known.out, known.merge)
    if known.command == "report":
        return benchmark_commands.report(known.directory, options.embed_images)
    if known.command == "candidates":
        return commands.export_candidates(_dataset(known), known.out, options)
    if known.command == "rerun":
        return benchmark_commands.rerun(known.run_id, known.output_dir, options)
    if known.model:
        return commands.run_model(known.model, _dataset(known), options)
    if known.dataset:
        raise UserError("--dataset without --model: add --model MLLMMSR, or use the commands benchmark or summarize")
    return benchmark_commands.demo(options)


def _is_setting(word: str, parser: Parser) -> bool:
    """Return whether `word` is ``--key=value`` of the configuration; argparse takes one with a space for no option."""
    name, equals, _ = word.partition("=")
    return bool(name.startswith("--") and equals) and not any(name in options for options in _options(parser))


def _options(parser: argparse.ArgumentParser) -> Iterator[Container[str]]:
    yield parser._option_string_actions
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)


def _parser() -> Parser:
    from recbole_mllm.benchmark.field import SETS, known_variants  # here, as `convert` does without numpy

    common = Parser(add_help=False)
    common.add_argument("--dataset", help="a folder name under data_path (default ./dataset)")
    common.add_argument("--config_files", help="YAML files or preset names, separated by spaces")
    common.add_argument("--limit_users", type=int, help="evaluate a seeded sample of this many users")
    common.add_argument("--image_dir", help="images by item id, where .item has no image column")
    common.add_argument("--seed", type=int, help="the run's seed; without a command: also the demo world's")
    parser = Parser(prog="recbole-mllm", description=_DESCRIPTION, epilog=_EPILOG, parents=[common])
    parser.add_argument("--model", help="a RecBole model or MLLMMSR")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(
        dest="command",
        metavar="{convert,inspect,plan,summarize,store,candidates,benchmark,report,rerun,export}",
        parser_class=Parser,
    )
    add: Any = commands.add_parser
    add("convert", help="raw dump to atomic files; see convert --help")
    summarize = add("summarize", help="make the summaries alone; resumable", parents=[_quiet(common)], epilog=_EPILOG)
    summarize.add_argument("--stage", choices=("items", "users", "all"), default="all")
    summarize.add_argument("--dry-run", action="store_true", help="only say how many prompts, tokens and how long")
    summarize.add_argument(
        "--since", metavar="WHEN", help="users with an interaction at or after this date or timestamp alone"
    )
    _add_plan(add("plan", help="what a run would cost, before it runs", parents=[_quiet(common)], epilog=_EPILOG))
    benchmark = add(
        "benchmark", help="many models, same candidates, one leaderboard", parents=[_quiet(common)], epilog=_EPILOG
    )
    known = f"RecBole's by name, MLLMMSR, {known_variants()}; or sets of them: {', '.join(SETS)}"
    benchmark.add_argument("--models", required=True, help=known)
    benchmark.add_argument("--seeds", help="e.g. 2024,2025; default: --seed, else 2024")
    benchmark.add_argument("--output_dir", help="default: results/<dataset>")
    benchmark.add_argument("--force", action="store_true", help="run again what is finished")
    benchmark.add_argument("--jobs", type=int, default=1, help="runs at a time")
    benchmark.add_argument(
        "--quick", action="store_true", help="baselines train for a few epochs: a first look, marked"
    )
    benchmark.add_argument("--tune", type=int, default=0, metavar="N", help="configurations each model may try first")
    _add_embed_images(benchmark)
    inspect = add("inspect", help="a dataset's health, as text and as a page")
    inspect.add_argument("directory", help="a dataset's folder, or its name under data_path (default ./dataset)")
    inspect.add_argument("--image_dir", default=argparse.SUPPRESS, help="images by item id")
    inspect.add_argument("--config_files", default=argparse.SUPPRESS, help="YAML files that name the dataset's fields")
    inspect.add_argument("--output", help="the page's file; default: inspect.html in the dataset's folder")
    report = add("report", help="render leaderboard.* again from runs.jsonl")
    report.add_argument("directory")
    _add_embed_images(report)
    candidates = add("candidates", help="the frozen candidates as a file; import them with --candidates_file=FILE")
    actions = candidates.add_subparsers(dest="action", metavar="{export}", required=True, parser_class=Parser)
    out = actions.add_parser("export", help="write them as JSON lines", parents=[_quiet(common)], epilog=_EPILOG)
    out.add_argument("--out", required=True, metavar="FILE", help="FILE.jsonl or FILE.jsonl.gz")
    rerun = add("rerun", help="repeat a recorded run and compare: exit code 0 if the numbers agree, 1 if not")
    rerun.add_argument("run_id", help="as in runs.jsonl")
    rerun.add_argument("--output_dir", help="the benchmark's; default: the one below results/ that has the run")
    export = add("export", help="a fine-tuned model as a folder that servers load (docs/servers.md)")
    export.add_argument("run", metavar="RUN", help="a checkpoint (FILE.pth), a run's folder, or its id under results/")
    export.add_argument(
        "--out", required=True, metavar="DIR", help="the folder to write; an earlier export is replaced"
    )
    export.add_argument("--merge", action="store_true", help="merge the adapter, so that the folder stands alone")
    store_commands.add_parser(add, Parser)
    return parser


def _add_plan(plan: Parser) -> None:
    plan.add_argument("--device", metavar="NAME", help="hours on a device of properties/devices.yaml, e.g. H100")
    plan.add_argument("--probe", action="store_true", help="hours on this machine: load the model and time a little")
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="split the work over N nodes")
    plan.add_argument("--devices_per_node", type=int, metavar="N", help="default: 8, on one node 1")
    plan.add_argument("--price_per_hour", type=float, metavar="X", help="of one device")
    plan.add_argument("--requests_per_s", type=float, metavar="X", help="of all servers, where models are behind some")
    plan.add_argument("--json", metavar="PATH", help="also write the plan as JSON (docs/plan.md)")


def _plan_request(known: argparse.Namespace) -> dict[str, Any]:
    names = ("device", "probe", "nodes", "devices_per_node", "price_per_hour", "requests_per_s")
    return {name: getattr(known, name) for name in names}


def _add_embed_images(command: Parser) -> None:
    command.add_argument(
        "--embed_images", choices=("on", "off"), default="on", help="thumbnails in the report's case studies"
    )


def _quiet(common: Parser) -> Parser:
    """Return a copy of the common options whose defaults do not overwrite what stood before the command."""
    copy = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for action in common._actions:
        # argparse takes back the `type` it keeps, which its stubs do not know
        copy.add_argument(*action.option_strings, type=action.type, help=action.help)  # type: ignore[arg-type]
    return copy


def _dataset(known: argparse.Namespace) -> str:
    if not known.dataset:
        raise UserError("--dataset is missing: give the name of a folder under data_path, or demo, or ml-100k-posters")
    return str(known.dataset)


def _overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read ``--key=value`` words; values are YAML, so 5 is a number, [1,2] a list and null nothing."""
    out: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals or not key:
            raise UserError(f"cannot read {word!r}; settings are written --key=value")
        try:
            out[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):  # YAML reads 2026-02-30 as a date, and is surprised
            raise UserError(f"cannot read the value of --{key}: {value[:80]!r} is no valid YAML") from None
    return out


if __name__ == "__main__":
    sys.exit(main())
