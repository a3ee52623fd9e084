"""What stock RecBole 1.2.1 needs to run on today's numpy, pandas, SciPy, torch and Python, and without ray.

Each shim is a function named for its cause, with the RecBole file:line that needs it. The tables say which module's
import calls it; RecBole's files are never edited.
"""

from __future__ import annotations

from collections.abc import Mapping

from recbole_mllm._importhook import Callback, after_import, before_import
from recbole_mllm.compat import absent, arrays, frames, patching, ranked, running

BEFORE: Mapping[str, tuple[Callback, ...]] = {
    "recbole.quick_start.quick_start": (absent.do_without_ray,),
    "thop.profile": (absent.do_without_distutils,),
    "thop.fx_profile": (absent.do_without_distutils,),
}

AFTER: Mapping[str, tuple[Callback, ...]] = {
    "recbole.config.configurator": (
        arrays.name_numpy_scalars,
        running.remember_model_classes,
        ranked.give_each_process_its_gpu,
    ),
    "recbole.data.dataset.dataset": (frames.mend_pandas_3, frames.read_past_marks, arrays.keep_dok_update),
    "recbole.evaluator.collector": (running.collect_plain_numbers,),
    "recbole.utils.logger": (ranked.log_in_main_alone,),
    "recbole.utils.utils": (
        arrays.load_checkpoints_whole,
        running.find_models,
        running.count_no_llm_flops,
        ranked.draw_curves_in_main_alone,
    ),
    "recbole.quick_start.quick_start": (patching.end_lending, running.ask_for_nccl),
    "recbole.model.sequential_recommender.sine": (running.train_without_detector,),
    "thop.profile": (patching.end_lending,),
    "thop.fx_profile": (patching.end_lending,),
}


def apply() -> None:
    """Put every shim in place: at once where its module has been imported, else as soon as it is."""
    absent.name_missing_recbole()
    for name, callbacks in BEFORE.items():
        for callback in callbacks:
            before_import(name, callback)
    for name, callbacks in AFTER.items():
        for callback in callbacks:
            after_import(name, callback)
