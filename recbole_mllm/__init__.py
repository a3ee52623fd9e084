"""MLLM-MSR for RecBole: multimodal LLMs as sequential recommenders.

Importing this imports nothing heavy. It arranges that RecBole, imported before or after, runs on today's libraries
and finds our model, and that is all stock RecBole needs:

    import recbole_mllm
    from recbole.quick_start import run_recbole
    run_recbole(model="MLLMMSR", dataset="demo", config_file_list=[recbole_mllm.preset("demo")])

For scripts and notebooks: `run_convert`, `run_inspect`, `run_summaries` and `run_benchmark` do what the commands do and
return pandas frames; `Recommender` ranks items for one user with a trained model's checkpoint.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from recbole_mllm.common.errors import UserError, did_you_mean
from recbole_mllm.common.resources import named, resource
from recbole_mllm.recbole_patches.apply import apply as _apply

if TYPE_CHECKING:
    from recbole_mllm.api import (
        BenchmarkResult,
        ConvertResult,
        InspectResult,
        SummariesResult,
        run_benchmark,
        run_convert,
        run_inspect,
        run_summaries,
    )
    from recbole_mllm.recommender import Recommender

__version__ = "0.2.0"
__all__ = [
    "BenchmarkResult",
    "ConvertResult",
    "InspectResult",
    "Recommender",
    "SummariesResult",
    "UserError",
    "__version__",
    "preset",
    "run_benchmark",
    "run_convert",
    "run_inspect",
    "run_summaries",
]

# What is imported once it is asked for: `Recommender` loads torch and RecBole
_LAZY = dict.fromkeys(__all__, "recbole_mllm.api") | {"Recommender": "recbole_mllm.recommender"}

_KINDS = ("quick_start_config", "model", "dataset", "prompt")


def preset(name: str) -> str:
    """Return the path of the YAML file `name` in properties/, for RecBole's ``config_file_list``.

    Raises:
        UserError: There is none; names the nearest.
    """
    for kind in _KINDS:
        found = resource(kind, name.removesuffix(".yaml"))
        if found is not None:
            return str(found)
    names = sorted({known for kind in _KINDS for known in named(kind)})
    hint = did_you_mean(name, names, f"there are {', '.join(names) or 'none'}")
    raise UserError(f"no preset is called {name!r}; {hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_apply()
