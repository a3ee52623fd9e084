"""One run of a benchmark, in a process of its own: reads its job, runs it, leaves arrays and one record."""

from __future__ import annotations

import json
import logging
import os
import platform
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

import recbole_mllm
from recbole_mllm.benchmark.cases import write_cases, write_titles
from recbole_mllm.benchmark.fusing import fuse_runs
from recbole_mllm.benchmark.records import (
    CANDIDATE_RULES,
    DECISIVE_FILES,
    NAMED_MODELS,
    PER_USER,
    RECORDS,
    SCORES,
    TRAIN_COUNTS,
    VALID_SCORES,
    WHO,
    RunRecord,
    append,
    config_digest,
    data_digests,
    plain_json,
    write_arrays,
)
from recbole_mllm.benchmark.search import TRIALS, search, space_of, trials
from recbole_mllm.benchmark.variants import baseline_defaults
from recbole_mllm.common import distributed
from recbole_mllm.common.config import benchmark_defaults, completed, config_paths, keys_for, per_model
from recbole_mllm.common.distributed import child_code
from recbole_mllm.common.errors import UserError, reason_of
from recbole_mllm.common.files import write_text
from recbole_mllm.common.model_names import identity_of, pinned
from recbole_mllm.common.resources import PROPERTIES
from recbole_mllm.common.yaml_files import read_mapping
from recbole_mllm.data.item_table import read_items

_PATHS = ("image_dir", *DECISIVE_FILES, *NAMED_MODELS)
RETRIEVERS = "retrievers"
NO_ONE_RANKING = (
    "this protocol leaves no ranking to compare models by: use eval_args.mode uniN, popN or full, with one target a "
    "user (split LS)"
)
NOTHING_TO_TUNE = ("Pop", "Random")
_OF_OUTCOME = (
    *("load_s", "train_s", "score_s", "summarize_reused", "scores_reused"),
    *("converged", "retrieval", "full_ranking", "world_size", "tokens"),
)


def main() -> int:
    """Run the job whose file is the only argument; a mistake of the user's is one line on standard error."""
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        run_job(job)
        return 0
    except distributed.LostProcess:
        raise
    except Exception as error:  # any kind may have a meaning; without one it stays as it is
        mistake = isinstance(error, UserError)
        reason = str(error) if mistake else reason_of(error, job["label"], job["dataset"])
        if reason is None:
            raise
        if error.__cause__ or not mistake:
            traceback.print_exc()  # the log has it all, the row the sentence
        print(f"UserError: {reason}", file=sys.stderr)
        return 2 if mistake else 1


def run_job(job: dict[str, Any]) -> None:
    """Run `job` (see `jobs.BenchmarkJob.order`) and append its record.

    The paths in it, and in its config files, start from the folder ``home``, where the user stood; default: from here.
    """
    from recbole_mllm.quick_start import run

    started = datetime.now().astimezone().isoformat(timespec="seconds")
    share_cores(job)
    output = (_home(job) / job["output_dir"]).resolve()
    folder = output / "runs" / job["run_id"]
    if "parts" in job:
        surroundings = {"started": started, "versions": _versions(), "commit": _commit(), "device": "cpu"}
        append(output / RECORDS, fuse_runs(job, (_home(job) / job["results"]).resolve(), folder, surroundings))
        return
    defaults = folder / ("defaults.yaml" if distributed.is_main() else f"defaults.{distributed.process_index()}.yaml")
    tuning = _tune(job, defaults)
    config = _config(job, defaults, tuning["chosen"] if tuning else {})
    whole = job["keep_valid"]  # a rerun needs the metrics alone
    reads_items = job["kind"] == "mllm" or bool(config["item_features"]) or "item" in (config["load_col"] or ())
    data = data_digests(config, reads_items=reads_items)
    with measured_energy(config["device"], alone=job.get("jobs") == 1) as energy:
        outcome = run(config, partial(_check_split, job), keep_valid=whole, rank_all=whole)
    peak = max(distributed.gather_objects(_peak_memory(outcome.config["device"])))
    if distributed.is_main():
        _write_evidence(outcome, folder)
        append(
            output / RECORDS, _record(job, outcome, started, tuning, {"peak_memory_mb": peak, "data": data, **energy})
        )


def share_cores(job: Mapping[str, Any]) -> None:
    """Compute with the threads that the job names, or with its share of the cores beside runs at the same time.

    Else each run would start one thread per core, and they would wait for each other. OMP_NUM_THREADS, if set, decides.
    """
    import torch

    threads = job.get("threads", torch.get_num_threads() // job.get("jobs", 1))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, threads))


def _home(job: Mapping[str, Any]) -> Path:
    return Path(job.get("home") or Path.cwd())


def _files(job: Mapping[str, Any]) -> list[str]:
    """Return the job's config files; what is no file may be a preset's name."""
    return config_paths([str(path) if (path := _home(job) / name).exists() else name for name in job["config_files"]])


def _config(job: Mapping[str, Any], defaults: Path, tuned: Mapping[str, Any]) -> Any:
    """Return the Config of `job`, whose defaults are written to the file `defaults` in the run's folder.

    Every path in it is absolute, and a retriever is trained as the row of its name is, unless its own ``per_model``
    section says otherwise.
    """
    from recbole_mllm.quick_start import make_config

    home, model, files = _home(job), job["model"], _files(job)
    retrievers = (home / job["output_dir"]).resolve() / RETRIEVERS  # trained once for all that rank by it
    known = {**benchmark_defaults(), "retriever_dir": str(retrievers), **drawn_negatives(model), **job["defaults"]}
    own: dict[str, Any] = {
        "seed": job["seed"],
        "checkpoint_dir": str(defaults.parent / "saved"),
        "frozen_candidates": True,
        "show_progress": False,
    }
    own |= {"save_dataset": False, "save_dataloaders": False, "dataset_save_path": None, "dataloaders_save_path": None}
    given = keys_for(files, model) | dict(job["overrides"])
    if job["limit_users"] is not None:  # else a config file's stands
        own["limit_users"] = job["limit_users"]
    if isinstance(place := given.get("data_path", "dataset"), str):
        own["data_path"] = str((home / place).resolve())
        if (dataset := Path(own["data_path"], job["dataset"], "dataset.yaml")).is_file():  # it wins over defaults
            known = completed(known, {key: value for key, value in read_mapping(dataset).items() if key in known})
    if isinstance(given.get("eval_args"), dict):
        own["eval_args"] = completed(known, given)["eval_args"]
    write_text(defaults, yaml.safe_dump(known))
    config = make_config(model, job["dataset"], [str(defaults), *files], {**tuned, **job["overrides"], **own})
    if config["retriever_dir"]:
        config["retriever_dir"] = str(home / config["retriever_dir"])
    for key in _PATHS:
        if isinstance(value := config[key], str) and (home / value).exists():
            config[key] = str((home / value).resolve())
    if name := config["retriever"]:
        others = config["per_model"] or {}
        own_keys = {**baseline_defaults(name), **others.get(name, {}), **per_model(files, name)}
        config["per_model"] = {**others, name: own_keys}
    return config


def _check_split(job: dict[str, Any], loaders: Any) -> None:
    """Refuse, before training, a run that could not stand beside the others of its benchmark."""
    expected, test = job.get("candidates"), loaders.test
    if expected and loaders.candidates != expected:
        raise UserError(
            f"its candidates are {loaders.candidates}, and were {expected} when the benchmark began; the "
            "dataset's files have changed since: start the benchmark again, into another --output_dir"
        )
    users = test._dataset.inter_feat[test._dataset.uid_field].numpy()
    full = "full" in test.config["eval_args"]["mode"].values()
    if full and getattr(test, "is_sequential", False) and len(set(users.tolist())) < len(users):
        raise UserError(NO_ONE_RANKING)


def digests_of(
    jobs: Sequence[Mapping[str, Any]], compared: bool, check: Callable[[Any], None] | None = None
) -> dict[str, str]:
    """Return the digest of the candidates each job will meet, by run id, before any of them is started.

    The dataset is read once for all jobs that its settings make the same for; not at all where that is all of them,
    unless they are to be `compared` with runs of before. A job whose library or dataset is not there says so itself.

    Args:
        jobs: The workers' orders (see `jobs.BenchmarkJob.order`).
        compared: Whether there are such runs.
        check: Called with the Config of each label; it may raise.

    Raises:
        UserError: A job's settings are none that it could run with.
    """
    from recbole.utils import init_seed

    from recbole_mllm.evaluation.candidates import decisive_keys, digest_of

    configs: dict[str, Any] = {}  # one a label: seeds share it
    keys: dict[str, tuple[str, int | None]] = {}
    with TemporaryDirectory() as folder:
        for job in jobs:
            with suppress(ImportError):
                if (label := job["label"]) not in configs:
                    configs[label] = _config(job, Path(folder) / "defaults.yaml", {})
                    if check is not None:
                        check(configs[label])
                key, by_seed = decisive_keys(configs[label])
                keys[job["run_id"]] = key, job["seed"] if by_seed else None
    digests: dict[Any, str] = {}
    for job in jobs if len(set(keys.values())) > 1 or compared else ():
        what = keys.get(job["run_id"])
        if what is not None and what not in digests:
            config = configs[job["label"]]
            config["seed"] = job["seed"]
            init_seed(job["seed"], config["reproducibility"])
            with suppress(UserError):
                digests[what] = digest_of(config)
    return {run: digests[what] for run, what in keys.items() if what in digests}


def drawn_negatives(model: str) -> dict[str, Any]:
    """Let a context-aware model learn from drawn negatives, as RecBole would have it read labels (configurator.py:309).

    Where the interactions have some, by a threshold on a rating, `train_neg_sample_args: null` goes back to them.
    """
    from recbole.utils import ModelType, get_model

    kind = getattr(get_model(model), "type", None)
    drawn = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": False, "candidate_num": 0}
    return {"train_neg_sample_args": drawn} if kind in (ModelType.CONTEXT, ModelType.DECISIONTREE) else {}


def _tune(job: dict[str, Any], defaults: Path) -> dict[str, Any] | None:
    """Search for the job's settings on validation, if it has a budget for that; what the user has set stays.

    What a preset sets is a default, the first trial's: with a backbone's there would be nothing left to search.
    """
    from recbole_mllm.quick_start import validate

    budget, model = job.get("tune"), job["model"]
    if not budget:
        return None
    files = [file for file in _files(job) if Path(file).parent != PROPERTIES / "quick_start_config"]
    given = {*keys_for(files, model), *job["overrides"]}
    default = _config(job, defaults, {})
    space = {} if model in NOTHING_TO_TUNE else space_of(model, given)
    found = search(
        trials(space, budget, job["seed"], {key: default[key] for key in space}),
        lambda tuned: validate(_config(job, defaults, tuned)),
        default["valid_metric_bigger"],
        journal=defaults.parent / TRIALS,
        measure=f"validation {default['valid_metric']}",
    )
    return {"budget": budget, "seed": job["seed"], "metric": default["valid_metric"], "space": space, **found}


def _write_evidence(outcome: Any, folder: Path) -> None:
    """Write the per-user metrics, the scored pairs and what case studies show."""
    from recbole_mllm.evaluation.protocol import training_counts, user_columns

    if outcome.pairs is None:
        raise UserError(NO_ONE_RANKING)
    config, data, pairs = outcome.config, outcome.dataset, outcome.pairs
    items = None
    with suppress(UserError):
        image_dir = config["image_dir"]
        items = read_items(Path(config["data_path"]), Path(image_dir) if image_dir else None, config["ITEM_ID_FIELD"])
    columns = user_columns(data, outcome.train_data._dataset, pairs, items and items.images)
    values = {name: column for name, column in outcome.users.items() if name != "user"}
    write_arrays(folder / PER_USER, columns | values)
    users, tokens = (np.asarray(data.field2id_token[field]).astype(str) for field in (data.uid_field, data.iid_field))
    write_arrays(folder / SCORES, _pair_columns(pairs, users, tokens))
    if outcome.valid_pairs is not None:
        write_arrays(folder / VALID_SCORES, _pair_columns(outcome.valid_pairs, users, tokens))
        counts, _ = training_counts(outcome.train_data._dataset, len(users), len(tokens))
        write_arrays(folder / TRAIN_COUNTS, {"item": tokens[1:], "count": counts[1:]})
    try:
        if write_cases(outcome, folder) is None and "among" in pairs and items is not None:
            write_titles(outcome, folder, items.titles)
    except Exception:  # what illustrates a result must not cost the hours that made it
        logging.getLogger(__name__).exception("this run's case studies could not be saved; the report has none of it")


def _pair_columns(pairs: Mapping[str, Any], users: Any, items: Any) -> dict[str, Any]:
    """Return a `joined` log as a file of scores holds it, by raw ids."""
    known = {"user": users[pairs["user_id"]], "item": items[pairs["item_id"]], "label": pairs["label"].astype("int8")}
    known |= {"score": pairs["score"], "place": pairs["place"].astype("int32")}
    return known | {name: pairs[name] for name in ("among", "answer") if name in pairs}


def _record(
    job: dict[str, Any], outcome: Any, started: str, tuning: dict[str, Any] | None, used: dict[str, Any]
) -> RunRecord:
    from recbole_mllm.evaluation.protocol import future_share, protocol_line

    features_s = None
    if outcome.config["item_features"]:
        from recbole_mllm.features.item_vectors import seconds_of

        features_s = seconds_of(outcome.config)
    config = outcome.config.final_config_dict
    recorded = plain_json(config)
    if job["kind"] == "mllm" or outcome.config["item_features"]:
        from recbole_mllm.features.item_vectors import settings_of
        from recbole_mllm.model.summarizers import provenance

        recorded["provenance"] = plain_json(provenance(settings_of(outcome.config), outcome.config["device"]))
        if outcome.config["item_features"] and (encoder := outcome.config["feature_encoder"]):
            recorded["provenance"]["weights"]["feature_encoder"] = identity_of(pinned(encoder))
    users = len(outcome.users["user"])
    place = f"runs/{job['run_id']}"
    return RunRecord(
        **{key: job[key] for key in WHO},
        status="ok",
        started=started,
        protocol=protocol_line(outcome.config, users),
        future_share=future_share(outcome.dataset, outcome.train_data._dataset, outcome.test_data._dataset)
        if job["keep_valid"]  # a rerun needs the metrics alone
        else None,
        candidates=outcome.candidates,
        candidate_rules=CANDIDATE_RULES,
        n_users=users,
        config_digest=config_digest(config),
        config=recorded,
        metrics=outcome.test,
        valid=outcome.valid,
        per_user=f"{place}/{PER_USER}",
        scores=f"{place}/{SCORES}",
        valid_scores=None if outcome.valid_pairs is None else f"{place}/{VALID_SCORES}",
        train_counts=None if outcome.valid_pairs is None else f"{place}/{TRAIN_COUNTS}",
        **{name: getattr(outcome, name) for name in _OF_OUTCOME},
        summarize_s=outcome.summarize_s if job["kind"] == "mllm" else None,
        features_s=features_s,
        pairs_per_s=max(0, outcome.pairs_scored - outcome.scores_reused) / outcome.score_s or None,
        parameters_trained=parameters_trained(outcome.model),
        **used,
        device=str(outcome.config["device"]),
        versions=_versions(),
        commit=_commit(),
        tuning=tuning,
    )


def parameters_trained(model: Any) -> int:
    """Return how many parameters learn; none of a model that RecBole calls traditional, whose one is a stand-in."""
    if getattr(getattr(model, "type", None), "name", "") == "TRADITIONAL":
        return 0
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextmanager
def measured_energy(device: Any, *, alone: bool) -> Iterator[dict[str, Any]]:
    """Yield what holds ``energy_kwh`` and ``energy_of`` afterwards, of the whole machine; without a meter, nothing.

    codecarbon (extra ``energy``) estimates what it cannot read, a processor by its name and all memory by its size; no
    estimate gets in here.

    Args:
        device: Torch's, of the run; on a GPU its meter counts too.
        alone: Whether no other run shares the machine.
    """
    found: dict[str, Any] = {}
    here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")  # no process on another machine
    tracker = _start_meter() if alone and here and find_spec("codecarbon") else None
    try:
        yield found
    finally:
        if tracker is not None:
            found |= _read_meter(tracker, device)


def _start_meter() -> Any:
    try:
        from codecarbon import OfflineEmissionsTracker

        tracker = OfflineEmissionsTracker(
            country_iso_code="USA", save_to_file=False, save_to_api=False, log_level="critical", pue=1.0,
            allow_multiple_runs=True, force_cpu_power=None, force_mode_cpu_load=False,
        )  # fmt: skip
        tracker.start()
        return tracker
    except Exception:  # whatever it meets on a machine: the run matters more than its meter
        logging.getLogger().warning("codecarbon cannot start, so energy is not measured", exc_info=True)
        return None


def _read_meter(tracker: Any, device: Any) -> dict[str, Any]:
    try:
        from codecarbon.core import cpu

        tracker.stop()
        data = tracker.final_emissions_data
        read = {"CPU": data.cpu_energy if cpu.is_rapl_available() else 0.0}
        read["GPU"] = data.gpu_energy if device.type == "cuda" else 0.0
    except Exception:  # as in `_start_meter`: a meter that fails leaves the run without a figure, and no more
        logging.getLogger().warning("codecarbon failed, so energy is not measured", exc_info=True)
        return {}
    metered = {name: kwh for name, kwh in read.items() if kwh > 0}
    return {"energy_kwh": sum(metered.values()), "energy_of": " and ".join(metered)} if metered else {}


def _peak_memory(device: Any) -> float:
    """Return the most memory this process held, in MB: the GPU's where there is one, else its resident set."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _versions() -> dict[str, str]:
    """Return what computed: floating-point sums differ from one processor, or number of threads, to another."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    machine = [f"{platform.system()} {cpu}", f"{torch.get_num_threads()} threads"]
    machine += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    libraries = ("recbole", "torch", "transformers", "peft", "numpy", "pandas")
    found = {"python": platform.python_version(), "recbole_mllm": recbole_mllm.__version__}
    return found | {"machine": ", ".join(machine)} | {name: version(name) for name in libraries}


def _commit() -> str:
    """Return the checkout's commit, or "" outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(child_code(main))
