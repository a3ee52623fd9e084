"""The commands as functions, for scripts and notebooks: what the command line prints they return as pandas frames.

A mistake in what is given raises `UserError` with the line that the command would print. The command line of the
calling process is never read, and no function ends it.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recbole_mllm.arguments import (
    Options,
    check_config,
    check_given,
    check_model,
    config_files,
    config_of,
    inspected_folder,
)
from recbole_mllm.benchmark.variants import expand, resolve
from recbole_mllm.common import distributed
from recbole_mllm.common.config import check_training, file_keys
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import BENCHMARK, check_folder
from recbole_mllm.common.resources import MLLM, converters
from recbole_mllm.common.settings import Seed, checked, several
from recbole_mllm.demo.builtin import is_demo

if TYPE_CHECKING:
    import pandas as pd

    from recbole_mllm.benchmark.html import Figure
    from recbole_mllm.benchmark.leaderboard import Leaderboard

DEMO_NOTE = (
    "This world is made so that the images carry the taste and some items are new: it shows that the machine works, "
    "not that MLLMs beat SASRec."
)
DEFAULT_SEED = 2024


def options_of(
    config_file_list: str | Path | Sequence[str | Path] | None, config_dict: Mapping[str, Any] | None
) -> Options:
    """Return what RecBole's ``run_recbole`` takes, as the commands take it; a file alone is a list of one."""
    keys = keys_of(config_dict)
    seed = keys.pop("seed", None)
    return Options(keys, tuple(several("config_file_list", config_file_list, str) if config_file_list else ()), seed)


def keys_of(config_dict: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the configuration keys that a function was given.

    Raises:
        UserError: They are none.
    """
    if isinstance(config_dict or {}, Mapping) and all(isinstance(key, str) for key in config_dict or {}):
        return dict(config_dict or {})
    raise UserError(f"config_dict is {str(config_dict)[:80]}; it must be a dict of configuration keys, each a text")


# ---- raw data


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion has written.

    Attributes:
        path: The dataset's folder; its last part is the dataset's name.
        counts: ``interactions``, ``users`` and ``items`` that were written.
        frame: The same after each step, with what the step dropped: columns ``after``, ``users``, ``items``,
            ``interactions``, ``dropped``.
        text: What the command prints.
    """

    path: Path
    counts: dict[str, int]
    frame: pd.DataFrame = field(repr=False)
    text: str = field(repr=False)


def run_convert(name: str, raw: str | Path, out: str | Path, **options: Any) -> ConvertResult:
    """Turn a raw dump into a dataset's folder of RecBole's atomic files, as ``recbole-mllm convert`` does.

    Args:
        name: ``csv``, ``microlens``, ``amazon2023`` or ``movielens``.
        raw: The folder of the raw files.
        out: The dataset's folder: new, empty, or an earlier output.
        options: As ``recbole-mllm convert NAME --help`` lists them, with underscores: ``interactions="log.csv"``,
            ``k_core=5``, ``protocol="temporal"``, ``skip_bad_rows=True``; None leaves one out.

    Raises:
        UserError: An option, a file or a line is not as it should be.
    """
    import pandas as pd

    words = [str(name), f"--raw={raw}", f"--out={out}"]
    for option, value in options.items():
        flag = f"--{option.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    done, lines = converters("options").run(words)
    names, rows = ("users", "items", "interactions"), []
    for before, step in zip([done.steps[0], *done.steps], done.steps, strict=False):
        counted = {each: getattr(step, each) for each in names}
        rows.append({"after": step.name, **counted, "dropped": before.interactions - step.interactions})
    counts = {each: int(rows[-1][each]) for each in names}
    return ConvertResult(Path(os.path.abspath(out)), counts, pd.DataFrame(rows), "\n".join(lines))


@dataclass(frozen=True)
class InspectResult:
    """A dataset's health.

    Attributes:
        text: What the command prints, findings first to last.
        path: The same as a page with charts.
    """

    text: str = field(repr=False)
    path: Path

    def __str__(self) -> str:
        return self.text


def run_inspect(dataset: str | Path, *, config_dict: Mapping[str, Any] | None = None) -> InspectResult:
    """Measure a dataset's health, as ``recbole-mllm inspect`` does.

    Args:
        dataset: A folder, or its name under ``data_path`` (a key, default ``dataset``).
        config_dict: Keys that say where the dataset lies and how its fields are called.

    Raises:
        UserError: The dataset cannot be read.
    """
    from recbole_mllm.inspect.health_page import PAGE, format_health, write_health
    from recbole_mllm.inspect.measure import measure

    keys = keys_of(config_dict)
    health = measure(folder := inspected_folder(str(dataset), keys, "run_inspect"), keys)
    lines = write_health(health, None)
    return InspectResult("\n".join([format_health(health), "", *lines]), folder / PAGE)


# ---- summaries


@dataclass(frozen=True)
class SummariesResult:
    """The summaries that a run of MLLMMSR with the same settings reads.

    Attributes:
        items: Columns ``item_id``, ``title``, ``summary``.
        users: Columns ``user_id``, ``seen`` (how many interactions a text has read), ``history`` (a digest of these:
            with ``max_history`` or benchmark files they may begin behind the user's first) and ``summary``, one row a
            state. Empty under ``stage="items"`` and ``summary_mode: none``.
        paths: The files that hold them.
        notes: Lines on what was left out, if anything.
    """

    items: pd.DataFrame = field(repr=False)
    users: pd.DataFrame = field(repr=False)
    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def run_summaries(
    dataset: str,
    *,
    config_file_list: Sequence[str | Path] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    stage: Literal["items", "users", "all"] = "all",
    since: str | None = None,
) -> SummariesResult:
    """Write the summaries that a training would read, as ``recbole-mllm summarize`` does, and return them.

    What the store holds is not generated again; what was interrupted resumes.

    Args:
        dataset: A folder's name under ``data_path`` (a key, default ``dataset``).
        config_file_list: YAML files or names of presets.
        config_dict: Configuration keys, which win over the files.
        stage: Which summaries.
        since: Only users with an interaction at or after this date or timestamp.

    Raises:
        UserError: The configuration or the dataset cannot be used.
    """
    import pandas as pd

    from recbole_mllm.data.atomic import read_atomic
    from recbole_mllm.data.item_table import read_items
    from recbole_mllm.quick_start import write_summaries

    checked("stage", stage, Literal["items", "users", "all"])
    config = config_of(MLLM, dataset, options_of(config_file_list, config_dict), recommends=False)
    written = write_summaries(config, stage, since=since)
    rows = {path.suffix: list(read_atomic(path)) for path in written.files}
    items = pd.DataFrame(rows.get(".isum", []), columns=["item_id", "summary"])
    titles = read_items(Path(config["data_path"]), None, config["ITEM_ID_FIELD"])
    items.insert(1, "title", [titles.title(item) for item in items["item_id"]])
    users = pd.DataFrame(rows.get(".usum", []), columns=["user_id", "seen", "history", "summary"])
    users["seen"] = users["seen"].astype(float).astype(int)
    return SummariesResult(items, users, written.files, tuple(written.left))


# ---- a benchmark


class BenchmarkResult:
    """The leaderboard of a benchmark's folder; in a notebook it shows itself.

    Attributes:
        folder: What the benchmark has written: runs, leaderboards, checkpoints.
        path: The HTML report.
        failed: The runs that were asked for and have failed, as ``DIN seed 2024``; their rows say why.
    """

    def __init__(self, folder: str | Path, failed: Sequence[str] = ()) -> None:
        from recbole_mllm.benchmark.report import HTML

        self.folder, self.failed = Path(folder), tuple(failed)
        self.path = self.folder / HTML

    @property
    def board(self) -> Leaderboard:
        """The leaderboard as values, read from the records as they are now."""
        from recbole_mllm.benchmark.report import read_leaderboard

        return read_leaderboard(self.folder)

    @property
    def ok(self) -> bool:
        """Whether a run has finished, and of those that were asked for each."""
        return bool(self.board.ranked) and not self.failed

    @property
    def frame(self) -> pd.DataFrame:
        """One row a model, best first, by its name.

        Columns: ``seeds`` and ``status``; what the model is (``backbone`` and the like); each metric's mean, its 95 %
        interval (``NAME low``, ``NAME high``) and corrected p-value (``NAME p_holm``, against ``tested_against``);
        seconds, tokens and memory. A model that failed has a ``status`` and no numbers.
        """
        from recbole_mllm.benchmark.leaderboard import ALL_COSTS
        from recbole_mllm.benchmark.setups import SETUP

        board, numbers = self.board, self.numbers
        names = [f"{name}{part}" for name in board.metrics for part in ("", " low", " high", " p_holm")]
        columns = ["kind", "seeds", "status", "converged", "tested_against", *SETUP, *names, *ALL_COSTS]
        return numbers[[name for name in columns if name in numbers]]

    @property
    def numbers(self) -> pd.DataFrame:
        """Every number of the leaderboard, as ``leaderboard.csv`` holds it, by model."""
        from recbole_mllm.benchmark.tables import numbers_table

        return numbers_table(self.board).set_index("model").infer_objects()

    def figure(self) -> Figure:
        """Return the report's chart of quality against cost, an SVG that shows inline and that ``save`` writes."""
        from recbole_mllm.benchmark.html import figure

        return figure(self.board)

    def recommender(self, model: str = MLLM, seed: int | None = None, **options: Any) -> Any:
        """Return a `Recommender` from the checkpoint of a row's run.

        Args:
            model: The row's name.
            seed: Which of its seeds; default: the first.
            options: As `Recommender` takes them.

        Raises:
            UserError: There is no such finished run.
        """
        from recbole_mllm.recommender import Recommender

        runs = {(row.model, run.seed): run.run_id for row in self.board.ranked for run in row.runs}
        found = next((run for (name, own), run in runs.items() if name == model and seed in (None, own)), None)
        if found is None:
            which = ", ".join(f"{name} (seed {own})" for name, own in runs)
            raise UserError(f"{self.folder} holds no finished run of {model}; there are {which or 'none'}")
        return Recommender(self.folder / "runs" / found, **options)

    def __repr__(self) -> str:
        return f"BenchmarkResult({str(self.folder)!r})"

    def __str__(self) -> str:
        from recbole_mllm.benchmark.tables import format_table

        return format_table(self.board)

    def _repr_html_(self) -> str:
        from recbole_mllm.benchmark.tables import words_table
        from recbole_mllm.benchmark.wording import finding, legend

        board = self.board
        table = words_table(board).to_html(index=False, border=0, justify="right")
        below = " ".join(filter(None, (legend(board), board.note)))
        head = f"<b>{html.escape(board.dataset)}</b>: {html.escape(finding(board))}"
        chart = self.figure().svg if any(row.seconds for row in board.ranked) else ""
        return f"<p>{head}</p>\n{table}\n<p><small>{html.escape(below)}</small></p>\n{chart}"


def run_benchmark(
    dataset: str,
    models: str | Iterable[str] = "quick",
    *,
    config_file_list: Sequence[str | Path] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    seeds: int | Iterable[int] | None = None,
    jobs: int = 1,
    tune: int = 0,
    quick: bool = False,
    force: bool = False,
    embed_images: bool = True,
) -> BenchmarkResult:
    """Run every model on the same candidates, as ``recbole-mllm benchmark`` does; finished runs are not repeated.

    Each run is a process of its own, started from this installation: a script needs no ``if __name__ ==
    "__main__"``. What could not run is refused before hours are spent on the rest; a run that fails has a row that says
    why. Ctrl-C (a notebook's stop button) raises KeyboardInterrupt, and the same call resumes.

    Args:
        dataset: A folder's name under ``data_path`` (a key, default ``dataset``), or ``demo``.
        models: Names of RecBole's models, ``MLLMMSR``, its variants, sets of them (``quick``), rows ``A+B``.
        config_file_list: YAML files or names of presets, for every model.
        config_dict: Configuration keys, which win over the files.
        output_dir: Default: ``results/<dataset>``.
        seeds: One or several; default: the key ``seed`` of the call or of a config file, else 2024.
        jobs: Runs at a time.
        tune: Configurations each model may try on validation first.
        quick: Baselines train for a few epochs alone: a first look, marked.
        force: Run again what is finished.
        embed_images: Thumbnails in the report's case studies.

    Raises:
        UserError: The models or the configuration cannot be run, or the results would not compare.
    """
    from recbole_mllm.benchmark.jobs import BenchmarkPlan
    from recbole_mllm.benchmark.runner import benchmark, follow
    from recbole_mllm.benchmark.worker import digests_of
    from recbole_mllm.evaluation.protocol import check_one_target

    def check(config: Any) -> None:
        check_config(config)
        check_training(config)
        check_one_target(config)

    options = options_of(config_file_list, config_dict)
    check_given(dataset, options)
    check_folder(folder := Path(output_dir or f"results/{dataset}"), BENCHMARK, "--output_dir")
    note = DEMO_NOTE if is_demo(dataset) else ""
    keys = dict(options.overrides)
    files = tuple(config_files(dataset, options))
    seed = file_keys(*files).get("seed") if options.seed is None else options.seed
    plan = BenchmarkPlan(
        dataset=dataset,
        labels=expand(",".join(several("--models", models, str))),
        seeds=tuple(several("--seeds", (DEFAULT_SEED if seed is None else seed) if seeds is None else seeds, Seed)),
        output_dir=folder,
        config_files=files,
        limit_users=keys.pop("limit_users", None),
        note=str(keys.pop("note", note)),
        overrides=keys,
        jobs=jobs,
        tune=tune,
        quick=quick,
        force=force,
        embed_images=embed_images,
    )
    for label in plan.labels:
        check_model(resolve(label).model)
    if distributed.is_main():
        return BenchmarkResult(folder, benchmark(plan, digests=partial(digests_of, check=check)))
    follow()
    return BenchmarkResult(folder)
