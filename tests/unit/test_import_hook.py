"""Callbacks run around a module's body, whoever imports it, in whatever order, and leave nothing behind."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
import threading
from importlib.machinery import SourceFileLoader

import pytest

from recbole_mllm import _importhook
from recbole_mllm._importhook import after_import, before_import


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Write a module of a name of its own, and forget it and its callbacks afterwards."""
    name = f"hooked_{request.node.name}"
    (tmp_path / f"{name}.py").write_text("import time\ntime.sleep(0.05)\nvalue = 1\n\n\ndef twice():\n    return 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)
    _importhook._FINDER.before.pop(name, None)
    _importhook._FINDER.after.pop(name, None)


def test_a_later_import_is_seen(module):
    seen = []
    after_import(module, lambda m: seen.append(m.value))
    assert seen == []
    importlib.import_module(module)
    assert seen == [1]


def test_an_earlier_import_is_seen_at_once(module):
    imported = importlib.import_module(module)
    seen = []
    after_import(module, seen.append)
    assert seen == [imported]


def test_a_module_may_be_prepared_before_its_body_runs(module):
    seen = []
    before_import(module, lambda m: seen.append(hasattr(m, "value")))
    importlib.import_module(module)
    assert seen == [False]


def test_the_same_callback_is_noted_once_and_runs_again_on_reload(module):
    seen = []
    for _ in range(3):
        after_import(module, seen.append)
    imported = importlib.import_module(module)
    assert len(seen) == 1
    importlib.reload(imported)
    assert len(seen) == 2


def test_an_imported_module_keeps_its_own_loader(module):
    after_import(module, lambda m: None)
    found = importlib.util.find_spec(module)
    assert found.origin.endswith(f"{module}.py")
    assert "value = 1" in found.loader.get_source(module)
    imported = importlib.import_module(module)
    assert type(imported.__loader__) is SourceFileLoader
    assert imported.__spec__.loader is imported.__loader__
    assert "return 2" in inspect.getsource(imported.twice)


def test_two_threads_import_once(module):
    seen, found = [], []
    after_import(module, seen.append)
    threads = [threading.Thread(target=lambda: found.append(importlib.import_module(module))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1
    assert found == seen * 4


def test_a_thread_in_the_middle_of_importing_is_waited_for(module):
    begun = threading.Event()
    before_import(module, lambda m: begun.set())
    thread = threading.Thread(target=importlib.import_module, args=(module,))
    thread.start()
    begun.wait(10)
    seen = []
    after_import(module, lambda m: seen.append(m.value))
    thread.join()
    assert seen and set(seen) == {1}


def test_a_callback_that_fails_fails_the_import(module):
    def refuse(_):
        raise RuntimeError("no")

    after_import(module, refuse)
    with pytest.raises(RuntimeError, match="no"):
        importlib.import_module(module)
    assert module not in sys.modules


def test_a_module_that_does_not_exist_is_still_missing():
    after_import("hooked_nowhere", lambda m: None)
    assert importlib.util.find_spec("hooked_nowhere") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hooked_nowhere")


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, recbole_mllm; print(sorted({'torch', 'numpy', 'pandas', 'recbole', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
