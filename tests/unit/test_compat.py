"""Each shim does what RecBole needs, for RecBole alone."""

import importlib
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import recbole_mllm
from recbole_mllm import UserError
from recbole_mllm.compat import absent, apply, patching, running

HIDE_RECBOLE = """
import sys
class Hide:
    @staticmethod
    def find_spec(name, path=None, target=None):
        found = None if name == "recbole" else PATH.find_spec(name, path, target)
        return found
from importlib.machinery import PathFinder as PATH
sys.meta_path[sys.meta_path.index(PATH)] = Hide
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_no_stand_in_is_left_behind():
    quick_start = importlib.import_module("recbole.quick_start.quick_start")
    assert "ray" not in sys.modules
    assert vars(quick_start)["__builtins__"]["__import__"] is __import__
    assert quick_start.tune.report(ndcg=1.0) is None


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
    done = python(HIDE_RECBOLE + "import recbole_mllm\nimport recbole.quick_start")
    assert done.stderr.strip().endswith("run `pip install --no-deps recbole==1.2.1`")
    caught = python(
        HIDE_RECBOLE + "import recbole_mllm\ntry: import recbole\nexcept recbole_mllm.UserError: print('caught')"
    )
    assert caught.stdout.strip() == "caught"


def test_applying_again_changes_nothing():
    from recbole.utils import get_model

    load = torch.load
    apply()
    importlib.reload(recbole_mllm)
    assert torch.load is load
    assert importlib.import_module("recbole.utils").get_model is get_model


def test_torch_load_of_user_code_stays_safe(tmp_path):
    importlib.import_module("recbole.utils.utils")
    torch.save({"config": SimpleNamespace(a=1)}, tmp_path / "it.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "it.pth")
    called = "import torch\ndef read(path, **how):\n    return torch.load(path, **how)\n"
    recbole_like, other = ModuleType("recbole.some.model"), ModuleType("recbole_gnn.trainer")
    for module in (recbole_like, other):
        exec(called, vars(module))
    assert recbole_like.read(tmp_path / "it.pth")["config"].a == 1
    with pytest.raises(Exception, match="Weights only load failed"):
        recbole_like.read(tmp_path / "it.pth", weights_only=True)
    with pytest.raises(Exception, match="Weights only load failed"):
        other.read(tmp_path / "it.pth")


def test_series_agg_of_user_code_stays_pandas_own():
    importlib.import_module("recbole.data.dataset.dataset")
    series = pd.Series([np.array([1, 2]), np.array([3])])
    recbole_like = ModuleType("recbole.data.dataset.some")
    exec("def lengths(series):\n    return series.agg(len)\n", vars(recbole_like))
    assert list(recbole_like.lengths(series)) == [2, 1]
    assert series.agg("count") == 2
    assert np.all(series.agg(len) == pd.Series.agg.__wrapped__(series, len))


def test_text_is_read_as_objects_with_empty_sequences(tmp_path):
    dataset = importlib.import_module("recbole.data.dataset.dataset")
    (tmp_path / "x").write_text("a:token\tb:token_seq\tc:float\nu\t\t1\n\tx y\t\n")
    frame = dataset.pd.read_csv(
        tmp_path / "x",
        delimiter="\t",
        dtype={"a:token": str, "b:token_seq": str, "c:float": np.float64},
        engine="python",
    )
    assert frame["a:token"].dtype == object and pd.isna(frame["a:token"][1])
    assert list(frame["b:token_seq"]) == ["", "x y"]
    assert dataset.pd.DataFrame is pd.DataFrame


@pytest.mark.parametrize("name", ["NoSuchModel", "Recformer"])
def test_an_unknown_model_is_named(name):
    from recbole.utils import get_model

    with pytest.raises(ValueError, match=rf"\[{name}\] is not the name of an existing model"):
        get_model(name)


def test_a_known_model_whose_library_is_missing_still_says_so(monkeypatch):
    from recbole.utils import get_model

    monkeypatch.setitem(sys.modules, "lightgbm", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "recbole.model.exlib_recommender.lightgbm", raising=False)
    with pytest.raises(ModuleNotFoundError, match="lightgbm"):
        get_model("LightGBM")


def test_flops_of_an_llm_are_not_counted():
    from recbole.utils import get_flops

    class MLLMMSR:
        def __deepcopy__(self, memo):
            raise AssertionError("an LLM was copied")

    class Child(MLLMMSR):
        pass

    assert get_flops(MLLMMSR(), None, None, None, None) == 0
    assert get_flops(Child(), None, None, None, None) == 0


def test_several_processes_without_nccl_name_torchrun(monkeypatch):
    from recbole.quick_start import run, run_recboles

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where there is a GPU
    with pytest.raises(UserError, match="torchrun --nproc_per_node 3"):
        run("BPR", "ml-100k", nproc=3)
    with pytest.raises(UserError, match="torchrun"):
        run_recboles(0, "BPR", "ml-100k", None, {"config_dict": {"nproc": 2}})


def test_a_model_class_is_remembered_until_its_name_is_asked_for(monkeypatch):
    from recbole.config import Config
    from recbole.model.general_recommender import BPR
    from recbole.utils import get_model

    class Mine(BPR):
        pass

    Own = type("BPR", (BPR,), {})
    monkeypatch.setattr(sys, "argv", ["x"])
    Config(Mine, "nothing", config_dict={"gpu_id": "", "embedding_size": 4})
    assert get_model("Mine") is Mine
    Config(Own, "nothing", config_dict={"gpu_id": ""})
    assert get_model("BPR") is Own
    Config("BPR", "nothing", config_dict={"gpu_id": ""})
    assert get_model("BPR") is BPR
    running._GIVEN.clear()


def test_versions_compare_by_number():
    assert absent.LooseVersion("2.13.0+cpu") >= absent.LooseVersion("1.10.0")
    assert absent.LooseVersion("1.9.0") < "1.10.0"


def test_a_module_alone_sees_what_it_is_lent():
    module = ModuleType("thop_like")
    patching.lend_imports(module, {"distutils.version": SimpleNamespace(LooseVersion=absent.LooseVersion)})
    exec("from distutils.version import LooseVersion\nimport os.path", vars(module))
    patching.end_lending(module)
    assert module.LooseVersion is absent.LooseVersion
    assert vars(module)["__builtins__"] is vars(importlib.import_module("builtins"))


def test_a_result_reaches_a_running_ray(monkeypatch):
    reported = []
    monkeypatch.setitem(sys.modules, "ray.tune", SimpleNamespace(report=reported.append))
    absent.report_to_ray(ndcg=0.5)
    assert reported == [{"ndcg": 0.5}]


def test_no_model_trains_under_the_anomaly_detector():
    import torch
    from recbole.utils import get_model

    get_model("SASRec")
    assert not torch.is_anomaly_enabled()
