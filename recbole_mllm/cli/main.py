"""The words of the command line: one parser, and one table from each command to the function that does it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from recbole_mllm import __version__
from recbole_mllm.arguments import Options, read_overrides
from recbole_mllm.benchmark.variants import SETS, known_variants
from recbole_mllm.cli import commands
from recbole_mllm.common import distributed
from recbole_mllm.common.console import Parser, exit_code
from recbole_mllm.common.errors import UserError

_DESCRIPTION = "MLLM-MSR for RecBole. Without arguments: the demo."
_EPILOG = "Any configuration key may follow as --key=value. Exit code 2 means a mistake in what was given."

COMMANDS = {
    "convert": (commands.convert, "raw files to RecBole's atomic files; see convert --help"),
    "split": (commands.split, "a new dataset folder with another split; see split --help"),
    "summarize": (commands.summarize, "write only the summaries; resumes after an interruption"),
    "plan": (commands.plan, "what a run would cost, before it runs"),
    "benchmark": (commands.benchmark, "many models, same candidates, one leaderboard"),
    "inspect": (commands.inspect, "a dataset's health, as text and as a page"),
    "probe-memory": (commands.probe_memory, "whether the LLM knows the dataset without any user's history"),
    "report": (commands.report, "write leaderboard.* again from runs.jsonl"),
    "candidates export": (commands.export_candidates, "write what every model is asked about as JSON lines"),
    "rerun": (
        commands.rerun,
        "repeat a recorded run and compare: exit code 0 if the numbers agree, 1 if not",
    ),
    "recommend": (commands.recommend, "the best items for a user, or for a history of items, from a checkpoint"),
    "export": (commands.export, "a fine-tuned model as a folder that servers load (docs/servers.md)"),
    "store stats": (commands.store_stats, "answers, tokens and seconds by model, kind of prompt and origin"),
    "store prune": (commands.store_prune, "delete answers"),
    "store export": (commands.store_export, "write the answers as JSON lines"),
    "store import": (commands.store_import, "take in the answers of an exported file, or an edited .isum or .usum"),
    "store show": (commands.store_show, "the summaries of an item or a user, and what asked for them"),
    "store set": (commands.store_set, "write a summary yourself"),
    "clean": (commands.clean, "list leftover files of runs; with --yes remove them"),
    "doctor": (commands.doctor, "versions, devices, RecBole, hub, disk, and what will be slow here"),
}
"""What does each command, given what argparse has read and the configuration keys beside it; and its help."""

_EXAMPLES = {
    "": (
        "recbole-mllm",
        "recbole-mllm --model SASRec --dataset demo --epochs=20",
        "recbole-mllm --model MLLMMSR --dataset mine --config_files qwen2.5-vl-7b",
    ),
    "convert": ("recbole-mllm convert csv --help",),
    "split": ("recbole-mllm split mine --protocol temporal --out dataset/mine-later",),
    "summarize": (
        "recbole-mllm summarize --dataset mine --config_files qwen2.5-vl-7b --dry-run",
        "recbole-mllm summarize --dataset mine --config_files qwen2.5-vl-7b --since 2026-11-03",
    ),
    "plan": ("recbole-mllm plan --dataset mine --config_files qwen2.5-vl-7b --device H100",),
    "benchmark": (
        "recbole-mllm benchmark --dataset demo --models Pop,SASRec,MLLMMSR --limit_users 50",
        "recbole-mllm benchmark --dataset mine --models quick,MLLMMSR+SASRec,controls --config_files qwen2.5-vl-7b",
    ),
    "inspect": ("recbole-mllm inspect mine", "recbole-mllm inspect dataset/mine --output health.html"),
    "probe-memory": ("recbole-mllm probe-memory mine --config_files qwen2.5-vl-7b",),
    "report": ("recbole-mllm report results/mine",),
    "candidates export": ("recbole-mllm candidates export --dataset mine --out candidates.jsonl.gz",),
    "rerun": ("recbole-mllm rerun SASRec-2024-1a2b3c4d",),
    "recommend": (
        "recbole-mllm recommend --checkpoint results/mine/runs/RUN_ID --user u0012 --top 5 --explain",
        "recbole-mllm recommend --checkpoint saved/MLLMMSR.pth --history i0335,i0261",
    ),
    "export": (
        "recbole-mllm export results/mine/runs/RUN_ID --out exported --merge",
        "recbole-mllm export results/mine/runs/RUN_ID --out exported --push-to-hub me/my-recommender",
    ),
    "store stats": ("recbole-mllm store stats mine",),
    "store prune": ('recbole-mllm store prune mine --model "server:*" --older-than 90 --dry-run',),
    "store export": ("recbole-mllm store export mine --out summaries.jsonl.gz",),
    "store import": (
        'recbole-mllm store import mine summaries.jsonl.gz --origin "Smith et al. 2026"',
        "recbole-mllm store import dataset/mine/mine.TAG.isum",
    ),
    "store show": (
        "recbole-mllm store show mine --item i0012 --prompt",
        "recbole-mllm store show mine --user u0003",
    ),
    "store set": (
        'recbole-mllm store set mine --item i0012 --text "A lamp of brass."',
        'recbole-mllm store set mine --user u0003 --position 6 --text "Likes brass lamps."',
    ),
    "clean": ("recbole-mllm clean results/mine", "recbole-mllm clean results/mine --kind logs,scratch --yes"),
    "doctor": ("recbole-mllm doctor",),
}
"""Command lines that each help ends with."""

_GROUPS = {
    "candidates": ("the frozen candidates as a file; import them with --candidates_file=FILE", "{export}"),
    "store": ("the summary store", "{stats,show,set,prune,export,import}"),
}
_CONFIGURED = ("summarize", "plan", "benchmark", "probe-memory", "candidates export")  # read a run's configuration
_KEYLESS = ("store", "export", "clean", "report")  # read none at all
_SHARED = ("", "summarize", "benchmark")  # several processes have something to share in them
_COMMON: dict[str, dict[str, Any]] = {
    "--dataset": {"help": "a folder name under data_path (default ./dataset)"},
    "--config_files": {"help": "YAML files or preset names, separated by spaces"},
    "--limit_users": {"type": int, "help": "evaluate a seeded sample of this many users"},
    "--image_dir": {"help": "images by item id, where .item has no image column"},
    "--seed": {"type": int, "help": "the run's seed; without a command: also the demo world's"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for a user's mistake (one line, no traceback), 1 otherwise."""
    # Threads that spin while they wait slow each other down several times over on a busy machine; read when torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = sys.argv[1:] if argv is None else argv
    return exit_code(
        lambda rest: distributed.exit_code(_run, words) if distributed.is_launched() else _run(rest), words
    )


def _run(words: list[str]) -> int:
    apart = words[:1] in (["convert"], ["split"])  # they have parsers of their own
    if not distributed.is_main() and ({"-h", "--help"} & set(words) or apart):
        return 0
    if apart:
        return COMMANDS[words[0]][0](argparse.Namespace(words=words[1:]), Options())
    known, rest = _read(words)
    name = " ".join(filter(None, (known.command, getattr(known, "action", None))))
    if name not in _SHARED and not distributed.is_main():
        return 0
    unread = [word for word in rest if known.command in _KEYLESS or not word.startswith("--") or "=" not in word]
    if name and unread and name not in _CONFIGURED:
        raise UserError(f"{name} takes no {unread[0]!r}; {_parser()[1][name].hint(unread[0])}")
    given = {key: getattr(known, key, None) for key in ("limit_users", "image_dir")}
    overrides = read_overrides(rest) | {key: value for key, value in given.items() if value is not None}
    options = Options(overrides, tuple(str(known.config_files or "").split()), known.seed)
    if name:
        return COMMANDS[name][0](known, options)
    if known.model:
        return commands.run_model(known, options)
    if known.dataset:
        raise UserError("--dataset without --model: add --model MLLMMSR, or use the commands benchmark or summarize")
    return commands.demo(options)


def _read(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return what the parser reads of `words`, and the rest of them.

    argparse takes ``--key=value`` with a space in it for no option, so those of the configuration are held back.
    """
    parser, parsers = _parser()
    options = {option for one in (parser, *parsers.values()) for option in one._option_string_actions}
    first = words[0] if words else ""
    if first.startswith("--") and "=" not in first and first not in options:  # else its value passes for a command
        raise UserError(f"there is no option {first!r}; {parser.hint(first)}")
    ours = [word for word in words if word.startswith("--") and "=" in word and word.partition("=")[0] not in options]
    known, rest = parser.parse_known_args([word for word in words if word not in ours])
    return known, rest + ours


def _parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser, and those of the commands by name."""
    parser = Parser(prog="recbole-mllm", description=_DESCRIPTION, epilog=_EPILOG, examples=_EXAMPLES[""])
    for option, settings in _COMMON.items():
        parser.add_argument(option, **settings)
    parser.add_argument("--model", help="a RecBole model or MLLMMSR")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=f"recbole-mllm {__version__}")
    words = "print a completion script for this shell"
    parser.add_argument("--print-completion", action=_Completion, choices=("bash", "zsh", "tcsh"), help=words)
    groups = {"": parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)}
    parsers: dict[str, Parser] = {}
    for name, (_, purpose) in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in groups:
            help_text, metavar = _GROUPS[group]
            one = groups[""].add_parser(group, help=help_text)
            groups[group] = one.add_subparsers(dest="action", metavar=metavar, required=True, parser_class=Parser)
        configured = name in _CONFIGURED
        parsers[name] = groups[group].add_parser(
            word,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            examples=_EXAMPLES[name],
            epilog=_EPILOG if configured else None,
        )
        for option, settings in _COMMON.items() if configured else ():
            parsers[name].add_argument(option, default=argparse.SUPPRESS, **settings)  # what stood before it stays
    _add_options(parsers)
    return parser, parsers


class _Completion(argparse.Action):
    """Prints the script of a shell that completes our words, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, _known: Any, shell: Any, _name: str | None = None) -> None:
        try:
            import shtab
        except ImportError:
            raise UserError('--print-completion needs shtab: pip install "recbole-mllm[cli]"') from None
        from recbole_mllm.common.resources import converters

        top = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        top.choices |= {
            "convert": converters("options").convert_parser(),
            "split": converters("options").split_parser(),
        }
        waiting: list[argparse.ArgumentParser] = [parser]
        for one in waiting:
            for action in one._actions:
                if isinstance(action, argparse._SubParsersAction):
                    waiting += action.choices.values()
                elif action.metavar in ("FILE", "PATH", "DIR", "RUN", "C") or action.dest in ("output", "output_dir"):
                    action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell))
        parser.exit()


class _Withdrawn(argparse.Action):
    """An option that `plan` had in an earlier version."""

    def __call__(self, _parser: Any, _known: Any, _value: Any, name: str | None = None) -> None:
        raise UserError(f"{name} is withdrawn: plan prices the devices of properties/devices.yaml (--device NAME)")


def _add_options(of: dict[str, Parser]) -> None:
    """Add what each command takes of its own."""
    add = of["summarize"].add_argument
    add("--stage", choices=("items", "users", "all"), default="all", help="which summaries")
    add("--dry-run", action="store_true", help="only show how many prompts and tokens, and how long; writes nothing")
    add("--since", metavar="WHEN", help="only users with an interaction at or after this date or timestamp")
    add = of["plan"].add_argument
    add("--device", metavar="NAME", help="hours on a device of properties/devices.yaml, e.g. H100")
    add("--nodes", type=int, default=1, metavar="N", help="split the work over N nodes")
    add("--devices_per_node", type=int, metavar="N", help="default: 8, on one node 1")
    add("--json", metavar="PATH", help="also write the plan as JSON (docs/plan.md)")
    for name in ("probe", "price_per_hour", "requests_per_s"):
        add(f"--{name}", nargs="?", dest=argparse.SUPPRESS, action=_Withdrawn, help=argparse.SUPPRESS)
    add = of["benchmark"].add_argument
    models = (
        f"RecBole's by name, MLLMMSR, {known_variants()}, MLLMMSR+SASRec (fused); or sets of them: {', '.join(SETS)}"
    )
    add("--models", required=True, help=models)
    add("--seeds", help="e.g. 2024,2025; default: the key seed, else 2024")
    add("--output_dir", help="default: results/<dataset>")
    add("--force", action="store_true", help="repeat finished runs")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--quick", action="store_true", help="baselines train for a few epochs: a first look, marked")
    add("--tune", type=int, default=0, metavar="N", help="configurations each model may try first")
    add = of["probe-memory"].add_argument
    add("where", metavar="DATASET", help="its name under data_path, as --dataset")
    add("--questions", type=int, default=100, metavar="N", help="of each kind; default: 100")
    add("--name", help="what the dataset is called in public, e.g. MovieLens-100K; default: as its folder")
    add = of["inspect"].add_argument
    add("directory", help="a dataset's folder, or its name under data_path (default ./dataset)")
    add("--image_dir", default=argparse.SUPPRESS, help="images by item id")
    add("--config_files", default=argparse.SUPPRESS, help="YAML files that name the dataset's fields")
    add("--output", help="the page's file; default: inspect.html in the dataset's folder")
    of["report"].add_argument("directory", help="what a benchmark wrote, e.g. results/demo")
    for name in ("benchmark", "report"):
        shown = "thumbnails in the report's case studies"
        of[name].add_argument("--embed_images", choices=("on", "off"), default="on", help=shown)
    of["candidates export"].add_argument("--out", required=True, metavar="FILE", help="FILE.jsonl or FILE.jsonl.gz")
    add = of["rerun"].add_argument
    add("run_id", help="as in runs.jsonl")
    add("--output_dir", help="the benchmark's; default: the one below results/ that has the run")
    add = of["recommend"].add_argument
    add("--checkpoint", required=True, metavar="C", help="FILE.pth, a run's folder, or its id under results/")
    who = of["recommend"].add_mutually_exclusive_group(required=True)
    who.add_argument("--user", metavar="U", help="a user of the dataset, by raw id")
    who.add_argument(
        "--history",
        metavar="I1,I2",
        help='of a user it has not seen: raw ids of items, oldest first; one with a comma as "a,b"',
    )
    add("--top", type=int, default=10, metavar="N", help="how many items (default 10)")
    what = of["recommend"].add_mutually_exclusive_group()
    what.add_argument("--candidates", metavar="FILE", help="rank only these items: one raw id per line")
    what.add_argument("--retriever_checkpoint", metavar="R", help="MLLMMSR ranks only this baseline's best items")
    add("--top_k", type=int, default=100, metavar="K", help="how many of the retriever's items (default 100)")
    add("--explain", action="store_true", help="print each state of the preference summary, with what it has read")
    add("--json", metavar="FILE", help="also write everything as JSON")
    add("--csv", metavar="FILE", help="also write the table as CSV")
    add = of["export"].add_argument
    add("run", metavar="RUN", help="a checkpoint (FILE.pth), a run's folder, or its id under results/")
    add("--out", required=True, metavar="DIR", help="the folder to write; an earlier export is replaced")
    add("--merge", action="store_true", help="merge the adapter into the weights; the folder then needs no base model")
    add = of["clean"].add_argument
    add("folders", nargs="*", metavar="FOLDER", help="default: dataset, results, saved, log, log_tensorboard, if there")
    words = "some of scratch, scores, retrievers (these by default), logs, pairs, checkpoints"
    add("--kind", metavar="K1,K2", help=f"{words}; docs/commands.md says what they are")
    add("--yes", action="store_true", help="remove them; without it they are only listed")
    for name, kind in {"export": "model's", "store export": "dataset's"}.items():
        words = f"also send it to a {kind} repository on the hub, made private where there is none (docs/publish.md)"
        of[name].add_argument("--push-to-hub", metavar="OWNER/NAME", help=words)
    add = of["store prune"].add_argument
    add("--older-than", type=float, metavar="DAYS", help="only those written longer ago")
    add("--dry-run", action="store_true", help="only show what would be deleted")
    of["store export"].add_argument("--out", required=True, metavar="FILE", help="FILE.jsonl or FILE.jsonl.gz")
    for name in ("store prune", "store export"):
        of[name].add_argument("--model", help="only this model's, as stats names it; * and ? match any characters")
    for name in ("store stats", "store prune", "store export", "store import", "store show", "store set"):
        own: dict[str, Any] = {"nargs": "?"} if name == "store import" else {}  # X.isum names its dataset
        of[name].add_argument("where", metavar="DATASET", help="its folder, or its name under ./dataset", **own)
    for name in ("store show", "store set"):
        whose = of[name].add_mutually_exclusive_group(required=True)
        whose.add_argument("--item", metavar="ID", help="an item's raw id")
        whose.add_argument("--user", metavar="ID", help="a user's raw id")
        of[name].add_argument("--tag", help="only of this tag, as in the file names X.TAG.isum and X.TAG.usum")
    of["store show"].add_argument("--prompt", action="store_true", help="also what the model was asked")
    add = of["store set"].add_argument
    add(
        "--position",
        type=int,
        metavar="P",
        help="which of a user's summaries: the one of P interactions; default: last",
    )
    add("--text", required=True, help="the summary that is to be read")
    add = of["store import"].add_argument
    add("file", metavar="FILE", help="what `store export` wrote, or X.TAG.isum or X.TAG.usum, edited")
    add("--replace", action="store_true", help="a known answer gives way to the file's")
    add("--origin", help="what marks the answers, e.g. the paper; default: the file's name")


if __name__ == "__main__":
    sys.exit(main())
