"""RecBole is changed around its imports, once, for RecBole alone; stock RecBole finds what is ours."""

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import small_world
import torch

import recbole_mllm
from recbole_mllm import UserError, registration
from recbole_mllm.quick_start import make_config, run
from recbole_mllm.recbole_patches import hooks, libraries
from recbole_mllm.recbole_patches.apply import PATCHES, apply
from recbole_mllm.recbole_patches.hooks import after_import, before_import

HIDE_RECBOLE = """
import sys
class Hide:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name == "recbole" else PATH.find_spec(name, path, target)
from importlib.machinery import PathFinder as PATH
sys.meta_path[sys.meta_path.index(PATH)] = Hide
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Write a module of a name of its own, and forget it and its callbacks afterwards."""
    name = f"hooked_{request.node.name}"
    (tmp_path / f"{name}.py").write_text("import time\n\nvalue = 1\n\n\ndef twice():\n    return 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)
    hooks._FINDER.before.pop(name, None)
    hooks._FINDER.after.pop(name, None)


def test_callbacks_run_around_a_modules_body_and_again_on_reload(module):
    before, after = [], []
    before_import(module, lambda m: before.append(hasattr(m, "value")))
    for _ in range(2):
        after_import(module, after.append)  # noted once
    assert importlib.util.find_spec(module).loader.get_source(module).startswith("import time")
    imported = importlib.import_module(module)
    assert (before, after) == ([False], [imported])
    assert type(imported.__loader__) is SourceFileLoader and imported.__spec__.loader is imported.__loader__
    assert "return 2" in inspect.getsource(imported.twice)
    importlib.reload(imported)
    assert len(after) == 2
    after_import(module, lambda m: after.append(m.value))  # at once, as it has been imported
    assert after[2:] == [1]


def test_importing_the_package_imports_nothing_heavy_and_any_part_of_recbole_may_follow():
    heavy = "{'torch', 'numpy', 'pandas', 'recbole', 'yaml'}"
    code = (
        f"import sys, recbole_mllm\nprint({heavy} & set(sys.modules))\nfrom recbole.config import Config\nprint(Config)"
    )
    done = python(code)
    assert done.stdout.splitlines() == ["set()", "<class 'recbole.config.configurator.Config'>"], done.stderr


def test_recbole_may_be_imported_first():
    done = python(
        "import sys\n"
        "from recbole.config import Config\n"
        "from recbole.data import create_dataset, data_preparation\n"
        "from recbole.utils import get_model\n"
        "import recbole_mllm, torch\n"
        "from recbole.quick_start import run_recbole\n"
        "import recbole.quick_start.quick_start as quick\n"
        "print(quick.create_dataset is create_dataset, quick.data_preparation is data_preparation)\n"
        "print(quick.get_model is get_model)\n"
        "print(hasattr(get_model, '__wrapped__'), hasattr(create_dataset, '__wrapped__'))\n"
        "sys.argv = ['x']\n"
        "print(Config('BPR', 'nothing', config_dict={'gpu_id': ''})['model'], 'ray' in sys.modules)\n"
    )
    assert done.stdout.split() == ["True"] * 5 + ["BPR", "False"], done.stderr


def test_a_missing_recbole_is_one_line_with_the_command():
    caught = "try: import recbole\nexcept recbole_mllm.UserError: print('caught')\nimport recbole.quick_start"
    done = python(f"{HIDE_RECBOLE}import recbole_mllm\n{caught}")
    assert done.stdout.strip() == "caught"
    assert done.stderr.strip().endswith("run `pip install --no-deps recbole==1.2.1`")


def test_every_patch_has_a_reason_and_applying_again_changes_nothing():
    from recbole.utils import get_model

    assert len(set(PATCHES)) == len(PATCHES) and all(patch.lines and patch.reason for patch in PATCHES)
    for patch in PATCHES:
        ours, _, function = patch.change.partition(":")
        assert callable(getattr(importlib.import_module(ours, "recbole_mllm.recbole_patches"), function))
    load = torch.load
    apply()
    importlib.reload(recbole_mllm)
    assert torch.load is load and importlib.import_module("recbole.utils").get_model is get_model


def test_no_stand_in_for_ray_is_left_behind_and_a_result_reaches_a_running_one(monkeypatch):
    quick_start = importlib.import_module("recbole.quick_start.quick_start")
    assert "ray" not in sys.modules
    assert quick_start.tune.report(ndcg=1.0) is None
    reported = []
    monkeypatch.setitem(sys.modules, "ray.tune", SimpleNamespace(report=reported.append))
    libraries.report_to_ray(ndcg=0.5)
    assert reported == [{"ndcg": 0.5}]


def test_torch_load_of_user_code_stays_safe(tmp_path):
    importlib.import_module("recbole.utils.utils")
    torch.save({"config": SimpleNamespace(a=1)}, tmp_path / "it.pth")
    called = "import torch\ndef read(path, **how):\n    return torch.load(path, **how)\n"
    recbole_like, other = ModuleType("recbole.some.model"), ModuleType("recbole_gnn.trainer")
    for module in (recbole_like, other):
        exec(called, vars(module))
    assert recbole_like.read(tmp_path / "it.pth")["config"].a == 1
    for read, how in ((torch.load, {}), (other.read, {}), (recbole_like.read, {"weights_only": True})):
        with pytest.raises(Exception, match="Weights only load failed"):
            read(tmp_path / "it.pth", **how)


def test_an_unknown_model_is_named_and_a_known_one_whose_library_is_missing_still_says_so(monkeypatch):
    from recbole.utils import get_model

    for name in ("NoSuchModel", "Recformer", "mllmmsr"):
        with pytest.raises(ValueError, match=rf"\[{name}\] is not the name of an existing model"):
            get_model(name)
    monkeypatch.setitem(sys.modules, "lightgbm", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "recbole.model.exlib_recommender.lightgbm", raising=False)
    with pytest.raises(ModuleNotFoundError, match="lightgbm"):
        get_model("LightGBM")


def test_no_llm_is_copied_to_count_its_flops_and_none_trains_under_the_anomaly_detector():
    from recbole.utils import get_flops, get_model

    child = type("Child", (type("MLLMMSR", (), {}),), {})
    assert get_flops(child(), None, None, None, None) == 0
    get_model("SASRec")
    assert not torch.is_anomaly_enabled()


def test_several_processes_without_nccl_name_torchrun(monkeypatch):
    from recbole.quick_start import run as run_model
    from recbole.quick_start import run_recboles

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where there is a GPU
    with pytest.raises(UserError, match="torchrun --nproc_per_node 3"):
        run_model("BPR", "ml-100k", nproc=3)
    with pytest.raises(UserError, match="torchrun"):
        run_recboles(0, "BPR", "ml-100k", None, {"config_dict": {"nproc": 2}})


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return a function that builds RecBole's Config in an empty folder, with the words of a command line."""
    from recbole.config import Config

    monkeypatch.chdir(tmp_path)

    def build(model, dataset, words=(), files=(), **more):
        monkeypatch.setattr(sys, "argv", ["x", *words])
        return Config(model, dataset, config_file_list=list(files), config_dict={"gpu_id": "", **more})

    yield build
    registration._GIVEN.clear()


def test_a_model_class_is_remembered_until_its_name_is_asked_for(config):
    from recbole.model.general_recommender import BPR
    from recbole.utils import get_model

    mine, own = type("Mine", (BPR,), {}), type("BPR", (BPR,), {})
    config(mine, "nothing", embedding_size=4)
    assert get_model("Mine") is mine
    config(own, "nothing")
    assert get_model("BPR") is own
    config("BPR", "nothing")
    assert get_model("BPR") is BPR


def test_our_protocol_and_the_users_settings_win_in_this_order_and_stock_models_keep_recboles(config, tmp_path):
    (tmp_path / "mine.yaml").write_text("lora_r: 3\nlora_alpha: 3\nepochs: 3\n")
    found = config("MLLMMSR", "nothing", ["--epochs=5"], [tmp_path / "mine.yaml"], lora_alpha=4, epochs=4, mllm="tiny")
    assert (found["lora_r"], found["lora_alpha"], found["epochs"]) == (3, 4, 5)
    assert found["eval_args"]["mode"] == {"valid": "uni20", "test": "uni20"} and found["frozen_candidates"] is True
    stock = config("SASRec", "nothing", train_neg_sample_args=None)
    assert stock["frozen_candidates"] is None and stock["topk"] == [10]
    assert stock["eval_args"]["mode"] == {"valid": "full", "test": "full"}


def test_a_section_for_our_model_counts_in_a_stock_run_too(config):
    files = [recbole_mllm.preset("qwen2.5-vl-7b")]
    found = config("MLLMMSR", "nothing", ["--train_batch_size=8"], files, epochs=2)
    assert (found["learning_rate"], found["train_batch_size"], found["epochs"]) == (5e-5, 8, 2)
    assert config("MLLMMSR", "nothing", (), files, learning_rate=0.1)["learning_rate"] == 0.1
    derived = type("Derived", (importlib.import_module("recbole.utils").get_model("MLLMMSR"),), {})
    assert config(derived, "nothing", (), files)["learning_rate"] == 5e-5


@pytest.mark.parametrize("model", ["MLLMMSR", "SASRec", "BPR"])
def test_a_datasets_own_yaml_is_read_for_every_model(config, tmp_path, model):
    (tmp_path / "dataset/mine").mkdir(parents=True)
    text = "TIME_FIELD: moment\neval_args: {split: {LS: valid_and_test}, order: TO, mode: uni7}\n"
    (tmp_path / "dataset/mine/dataset.yaml").write_text(text)
    found = config(model, "mine", train_neg_sample_args=None, mllm="tiny")
    assert found["TIME_FIELD"] == "moment" and found["eval_args"]["mode"]["test"] == "uni7"
    assert config(model, "mine", train_neg_sample_args=None, mllm="tiny", TIME_FIELD="t")["TIME_FIELD"] == "t"


def test_a_preset_is_a_path_and_an_unknown_one_names_the_nearest():
    assert recbole_mllm.preset("MLLMMSR").endswith("MLLMMSR.yaml")
    with pytest.raises(UserError, match="did you mean MLLMMSR"):
        recbole_mllm.preset("MLLMSR")


@pytest.fixture
def keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_world.write(tmp_path / "dataset")
    load = {"inter": ["user_id", "item_id", "timestamp"]}
    return {"epochs": 1, "hidden_size": 8, "load_col": load, "show_progress": False, "checkpoint_dir": "saved"}


def test_metrics_that_count_items_are_measured(keys):
    several = ["NDCG", "ItemCoverage", "GiniIndex", "ShannonEntropy", "AveragePopularity", "TailPercentage"]
    found = run(make_config("SASRec", "steps", [], keys | {"metrics": several, "topk": 60,
                                                          "valid_metric": "itemcoverage@60"})).test  # fmt: skip
    # the best 60 of 60 items are all of them, which RecBole counts 61 with the padding, each as often as the others
    assert found["ItemCoverage@60"] == pytest.approx(60 / 61, abs=1e-4)
    assert found["GiniIndex@60"] == pytest.approx(1 / 61, abs=1e-4)
    assert found["AveragePopularity@60"] > 0


def test_a_saved_dataset_is_split_as_this_run_says(keys):
    split = {"split": {"RS": [8, 1, 1]}, "order": "RO", "group_by": "user", "mode": "full"}
    run(make_config("BPR", "steps", [], keys | {"save_dataset": True, "eval_args": split, "epochs": 0}))
    now = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni5"}
    done = run(make_config("Pop", "steps", [], keys | {"eval_args": now, "frozen_candidates": True}))
    hits = done.pairs["label"] > 0
    users, items = (done.dataset.id2token(f, done.pairs[f][hits]) for f in ("user_id", "item_id"))
    assert sorted(users) == [f"u{n:02d}" for n in range(small_world.USERS)]
    assert list(items) == [small_world.item(2 * int(u[1:]) + small_world.LENGTH - 1) for u in users]  # the last of each
    later = Path("saved/steps-Dataset.pth").stat().st_mtime + 9
    os.utime("dataset/steps/steps.inter", (later, later))
    with pytest.raises(UserError, match=r"steps\.inter is newer than saved/steps-Dataset\.pth"):
        run(make_config("Pop", "steps", [], keys))
