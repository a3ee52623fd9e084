"""What a label stands for, and the name of a run by what decides its outcome."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from stock_forward import KEYS

from recbole_mllm.benchmark import worker
from recbole_mllm.benchmark.jobs import BenchmarkJob, BenchmarkPlan, jobs_of
from recbole_mllm.benchmark.variants import SETS, VARIANTS, expand, resolve
from recbole_mllm.common.config import config_paths, per_model
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.settings import Settings


def jobs(*labels: str, **changes: Any) -> list[BenchmarkJob]:
    values: dict[str, Any] = {"dataset": "demo", "labels": labels, "seeds": (2024,), "output_dir": Path("results")}
    return jobs_of(BenchmarkPlan(**(values | changes)))


def test_the_order_given_to_the_worker(tmp_path):
    (config := tmp_path / "mine.yaml").write_text("epochs: 3")
    job, variant = jobs("SASRec", "MLLMMSR:no-image", config_files=(str(config),), limit_users=5,
                        overrides={"epochs": 7, "use_image": True})  # fmt: skip
    order = job.order()
    assert order["overrides"]["epochs"] == 7 and order["defaults"]["epochs"] == 50
    assert variant.order()["overrides"]["use_image"] is False, "a label must mean what it says"
    assert (order["model"], order["limit_users"], order["config_files"]) == ("SASRec", 5, [str(config)])


def test_a_quick_look_shortens_baselines_alone_and_the_command_line_wins():
    names = ("SASRec", "GRU4Rec", "ItemKNN", "TALLRec", "MLLMMSR")
    slow, quick = ({job.entry.label: job for job in jobs(*names, quick=how)} for how in (False, True))
    assert quick["SASRec"].order()["overrides"] == {"epochs": 3, "eval_step": 1}
    assert quick["GRU4Rec"].order()["overrides"]["epochs"] == 4
    for name in ("ItemKNN", "TALLRec", "MLLMMSR"):
        assert quick[name].order() == slow[name].order() and quick[name].run_id == slow[name].run_id
    assert quick["SASRec"].run_id != slow["SASRec"].run_id
    (given,) = jobs("SASRec", quick=True, overrides={"epochs": 9})
    assert given.order()["overrides"]["epochs"] == 9
    cap = per_model(config_paths(["ml-100k-posters"]), "SASRec")
    assert cap["epochs"] >= 50 and cap["stopping_step"] == 2 and cap["eval_step"] == 1


def test_a_run_id_covers_what_decides_the_outcome_files_by_what_they_hold(tmp_path):
    first, moved, config = tmp_path / "first.jsonl", tmp_path / "moved.jsonl", tmp_path / "given.yaml"
    config.write_text(f"candidates_file: {first}\n")

    def named() -> list[str]:
        ways = ({"overrides": {"candidates_file": str(file)}} for file in (first, moved))
        return [jobs("Pop", **way)[0].run_id for way in (*ways, {"config_files": (str(config),)})]

    for file in (first, moved):
        file.write_text("one")
    before = named()
    for file in (first, moved):
        file.write_text("another")
    after = named()
    assert before[0] == before[1] != after[0] == after[1] and before[2] != after[2]
    one, two = jobs("Pop", "Pop", seeds=(1, 2, 1), config_files=(str(config),))
    assert one.run_id.startswith("Pop-1-") and one.run_id[-8:] == two.run_id[-8:], "seeds are averaged"
    config.write_text("epochs: 4")
    assert jobs("Pop", seeds=(1,), config_files=(str(config),))[0].run_id != one.run_id


def test_a_run_id_covers_of_a_config_file_what_the_run_reads(tmp_path):
    (style := tmp_path / "style.yaml").write_text("one")
    config, given = tmp_path / "given.yaml", {"epochs": 3, "topk": [5, 10]}

    def named(sections: dict[str, Any], comment: str = "", **keys: Any) -> list[str]:
        config.write_text(comment + yaml.safe_dump(given | keys | {"per_model": sections}))
        return [job.run_id for job in jobs("MLLMMSR", "SASRec", "TALLRec", config_files=("demo", str(config)))]

    mine, other = {"mllm": "tiny", "prompt_style": str(style)}, {"n_layers": 1}
    mllm, sasrec, tallrec = before = named({"MLLMMSR": mine, "SASRec": other})
    assert named({"SASRec": other, "MLLMMSR": mine}, "# why\n") == before
    assert named({"MLLMMSR": mine, "SASRec": other, "BPR": {"epochs": 9}}) == before
    changed = named({"MLLMMSR": mine, "SASRec": {"n_layers": 2}})
    assert changed[0] == mllm and changed[1] != sasrec and changed[2] == tallrec
    changed = named({"MLLMMSR": mine | {"epochs": 2}, "SASRec": other})
    assert changed[0] != mllm and changed[1] == sasrec and changed[2] != tallrec, "a variant reads its model's section"
    assert not set(named({"MLLMMSR": mine, "SASRec": other}, epochs=4)) & set(before)
    with_retriever = mine | {"retriever": "SASRec"}
    ranked = [named({"MLLMMSR": with_retriever, "SASRec": {"n_layers": layers}})[0] for layers in (1, 2, 2)]
    assert ranked[0] != ranked[1] == ranked[2], "what a retriever reads decides what is ranked"
    style.write_text("another")
    changed = named({"MLLMMSR": mine, "SASRec": other})
    assert changed[0] != mllm and changed[1] == sasrec, "a file named in a model's section counts by what it holds"


@pytest.mark.parametrize(
    ("model", "added", "changed"),
    [
        ("SASRec", {"mllm": "tiny", "lora_r": 4, "prompt_style": "demo", "block_size": 5}, False),
        ("SASRec", {"learning_rate": 0.01}, True),
        ("SASRec", {"candidate_seed": 3}, True),
        ("SASRecF:text", {"mllm": "tiny"}, True),
        ("SASRecF", {"mllm": "tiny"}, True),
        ("MLLMMSR", {"lora_r": 4}, True),
    ],
)
@pytest.mark.parametrize("way", ["file", "line"])
def test_a_baseline_is_not_run_again_for_keys_of_the_mllm(model, added, changed, way, tmp_path):
    (config := tmp_path / "added.yaml").write_text(yaml.safe_dump(added))
    given = {"config_files": ("microlens", str(config))} if way == "file" else {"overrides": added}
    (before,), (after,) = (
        jobs(model, config_files=("microlens",)),
        jobs(model, **({"config_files": ("microlens",)} | given)),
    )
    assert (before.run_id != after.run_id) == changed


def test_a_backbones_preset_leaves_the_baselines_as_they_are(tmp_path):
    """Its learning rate and batches are the MLLM's: SASRec at 5e-5 would be no baseline."""
    (config := tmp_path / "mine.yaml").write_text("learning_rate: 0.002")
    for files in (("demo",), ("demo", "qwen2.5-vl-7b"), ("qwen2.5-vl-7b", "demo"), ("paper", "demo")):
        for label, rate, batch in (("SASRec", 0.001, 256), ("BPR", 0.001, 256), ("GRU4Rec", 0.005, 256)):
            found = worker_config(tmp_path, label, files)
            assert (found["learning_rate"], found["train_batch_size"]) == (rate, batch)
        mllm = worker_config(tmp_path, "MLLMMSR", files)
        wanted = {"qwen2.5-vl-7b": (5e-5, 16), "paper": (2e-5, 1)}.get(next(iter({*files} - {"demo"}), ""), (1e-3, 64))
        assert (mllm["learning_rate"], mllm["train_batch_size"]) == wanted
        assert mllm["epochs"] == (10 if "paper" in files else 1)
    for label in ("SASRec", "GRU4Rec", "MLLMMSR"):
        found = worker_config(tmp_path, label, ("qwen2.5-vl-7b", str(config)))
        assert found["learning_rate"] == 0.002, "a plain key is for every model, and a later file wins"
    found = worker_config(tmp_path, "MLLMMSR", (str(config), "qwen2.5-vl-7b"))
    assert found["learning_rate"] == 5e-5


def test_a_datasets_own_keys_train_all_models_alike_and_are_part_of_their_ids(tmp_path):
    (own := tmp_path / "dataset/mine/dataset.yaml").parent.mkdir(parents=True)
    given = {"dataset": "mine", "overrides": {"mllm": "tiny", "data_path": str(tmp_path / "dataset")}}

    def ids() -> list[str]:
        return [job.run_id for job in jobs("SASRec", "MLLMMSR", **given)]

    before = ids()
    own.write_text("USER_ID_FIELD: user_id\nitem_kind: movie\nglobal_times: false\n")
    assert ids()[0] == before[0], "where the data stand, and how an MLLM is asked, is nothing to SASRec"
    own.write_text("learning_rate: 0.02\nepochs: 7\ntrain_batch_size: 64\ntopk: [4]\neval_args: {mode: uni7}\n")
    assert not {*ids()} & {*before}
    for label in ("SASRec", "GRU4Rec", "MLLMMSR"):
        (job,) = jobs(label, output_dir=tmp_path, **given)
        found = worker._config(job.order(), tmp_path / "defaults.yaml", {})
        assert (found["epochs"], found["learning_rate"], found["train_batch_size"]) == (7, 0.02, 64), label
        assert (found["topk"], found["eval_args"]["split"]) == ([4], {"LS": "valid_and_test"}), label
        assert found["eval_args"]["mode"] == {"valid": "uni7", "test": "uni7"}, label


def test_a_search_may_try_what_a_preset_sets_and_not_what_the_user_set(tmp_path, monkeypatch):
    tried: list[list[str]] = []
    monkeypatch.setattr(worker, "space_of", lambda model, given: tried.append(sorted(given)) or {})
    monkeypatch.setattr(worker, "search", lambda *_, **__: {})
    (mine := tmp_path / "mine.yaml").write_text("lora_alpha: 8")
    (job,) = jobs("MLLMMSR", config_files=("demo", "qwen2.5-vl-7b", str(mine)), tune=3, output_dir=tmp_path)
    worker._tune(job.order(), tmp_path / "defaults.yaml")
    assert tried == [["lora_alpha"]]


def worker_config(place: Path, label: str, files: tuple[str, ...]) -> Any:
    (job,) = jobs(label, config_files=("demo", *files), output_dir=place)
    return worker._config(job.order(), place / "defaults.yaml", {})


def test_presets_change_what_they_say():
    assert resolve("MLLMMSR").kind == "mllm" and not resolve("MLLMMSR").overrides
    assert resolve("MLLMMSR:block-5").overrides == {"block_size": 5}
    assert resolve("MLLMMSR:no-sft").overrides == resolve("MLLMMSR:zero-shot").overrides == {"finetune": "none"}
    for entry in (resolve(f"MLLMMSR:{name}") for name in VARIANTS):
        complete = KEYS | entry.overrides
        Settings.from_config(complete)  # each key exists and each value is one of those it may have
        assert complete != KEYS, "a variant must differ from what it varies"


def test_baselines_have_their_own_defaults():
    entry = resolve("TALLRec")
    assert (entry.label, entry.model, entry.kind) == ("TALLRec", "MLLMMSR", "baseline")
    assert entry.overrides == {"summary_mode": "none", "item_summary": "none", "use_image": False}
    assert resolve("ItemKNN").defaults == {"k": 200} and not resolve("Pop").defaults
    narm = resolve("NARM").defaults
    assert (narm["learning_rate"], narm["train_batch_size"]) == (0.005, 256)


def test_sets_of_models():
    assert expand("quick, TALLRec,Pop") == ("Pop", "ItemKNN", "SASRec", "GRU4Rec", "MLLMMSR", "TALLRec")
    for label in expand(",".join(SETS)):
        resolve(label)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("MLLMMSR:block-0", "block-N"),
        ("MLLMMSR:no-images", "did you mean no-image"),
        ("MLLMMSR:block3", "did you mean block-3"),
        ("Pop:direct", "only these have named variants: MLLMMSR:zero-shot"),
        ("", "no model"),
        ("MLLMMSR+", "one baseline"),
        ("+", "one baseline"),
    ],
)
def test_an_unknown_label_is_refused_before_anything_runs(label, words):
    with pytest.raises(UserError, match=words):
        jobs("Pop", label)


@pytest.mark.parametrize("changes", [{"labels": ()}, {"seeds": ()}, {"jobs": 0}, {"limit_users": 0}])
def test_a_plan_that_cannot_run_is_refused(changes):
    with pytest.raises(UserError):
        jobs("Pop", **changes)


def test_a_retriever_is_trained_as_the_row_of_its_name_is(tmp_path):
    (first := tmp_path / "first.yaml").write_text("retriever: SASRec\nper_model: {SASRec: {epochs: 9, n_layers: 1}}")
    (then := tmp_path / "then.yaml").write_text("epochs: 4")
    row, run = (worker_config(tmp_path, label, (str(first), str(then))) for label in ("SASRec", "MLLMMSR"))
    assert all(row[key] == value for key, value in run["per_model"]["SASRec"].items())
    assert run["per_model"]["SASRec"]["epochs"] == 4 and run["per_model"]["SASRec"]["n_layers"] == 1
