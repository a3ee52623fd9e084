"""The table of all changes to RecBole 1.2.1, and the function that puts them in place.

A change is a function that is called with the module of RecBole it changes. It is imported when RecBole's module is:
``import recbole_mllm`` itself imports nothing heavy, and may come before or after RecBole.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import NamedTuple

from recbole_mllm.recbole_patches.hooks import after_import, before_import
from recbole_mllm.recbole_patches.libraries import MissingRecBoleFinder


class Patch(NamedTuple):
    """One change.

    Args:
        module: RecBole's module; `change` is called once its body has run.
        change: ``module:function`` of ours; a module that starts with a dot is of this package.
        lines: Where in the module's file the reason lies, or in which other file.
        reason: Why RecBole cannot stay as it is.
        attribute: What of the module `change` takes, where not the module itself.
        before: Whether `change` is called before the module's body runs.
    """

    module: str
    change: str
    lines: str
    reason: str
    attribute: str = ""
    before: bool = False

    def change_module(self, module: ModuleType) -> None:
        """Call `change` with `module`, or with its `attribute`."""
        ours, _, function = self.change.partition(":")
        target = getattr(module, self.attribute) if self.attribute else module
        getattr(importlib.import_module(ours, __package__), function)(target)


_QUICK_START, _CONFIG, _UTILS = "recbole.quick_start.quick_start", "recbole.config.configurator", "recbole.utils.utils"
_DATASET, _SEQUENTIAL = "recbole.data.dataset.dataset", "recbole.data.dataset.sequential_dataset"
_COLLECTOR = "recbole.evaluator.collector"

# fmt: off
PATCHES = (
    # Libraries that have changed since, or need not be there
    Patch(_QUICK_START, ".libraries:do_without_ray", "20", "imports ray, which need not be installed", before=True),
    Patch(_CONFIG, ".libraries:restore_numpy_names", "625-635", "numpy 2 has no np.float_"),
    Patch("recbole.evaluator.metrics", ".libraries:set_numpy_names", "90", "the same, where nobody makes a Config"),
    Patch(_UTILS, ".libraries:load_checkpoints_whole", "trainer/trainer.py:323", "torch 2.6 loads weights only"),
    Patch(_DATASET, ".libraries:adapt_to_pandas_3", "636-657, 712", "copy-on-write, and agg(len) of a whole column"),
    Patch(_DATASET, ".libraries:read_text_as_objects", "486, 501", "pandas 3 reads another type; NA is a word here"),
    Patch(_DATASET, ".libraries:read_past_marks", "459", "a byte order mark would be a part of the first column"),
    Patch(_DATASET, ".libraries:restore_dok_update", "lightgcn.py:111 and more", "SciPy 1.13 lost dok_matrix._update"),
    # Loops over rows, as arrays with the same results; not with RECBOLE_MLLM_FASTDATA=off
    Patch("recbole.data.interaction", ".fast_loading:index_by_tensor", "133-141", "builds a list for every column"),
    Patch(_DATASET, ".fast_loading:group_by_sorting", "1591, 1666", "groups and leaves one out row by row"),
    Patch(_SEQUENTIAL, ".fast_loading:augment_as_arrays", "77-152", "a loop over rows, and lists padded for each"),
    Patch("recbole.sampler.sampler", ".used_ids:look_up_pairs", "142-262", "a set of items for each user and phase"),
    # What goes wrong between a model's name and its first epoch
    Patch(_UTILS, ".behaviour:count_no_llm_flops", "250", "copies the model to count its FLOPs"),
    Patch(_QUICK_START, ".behaviour:ask_for_nccl", "53", "several processes need NCCL, and fail without a word of it"),
    Patch(_COLLECTOR, ".behaviour:collect_plain_numbers", "226", "asks numbers for .cpu()"),
    Patch("recbole.model.sequential_recommender.sine", ".behaviour:train_without_detector", "25",
          "its import slows down the training of every model"),
    # One of several processes that a launcher has started
    Patch(_CONFIG, ".processes:give_each_process_its_gpu", "477-515", "makes GPU 0 the only one, for every process"),
    Patch("recbole.utils.logger", ".processes:log_in_main_alone", "69", "a log file for each process"),
    Patch(_UTILS, ".processes:place_curves", "208", "a Tensorboard log for each process, where it stands"),
    # Files, order and histories of a dataset
    Patch(_DATASET, ".paper_protocol:read_whole_log", "277", "a temporal split's histories are those of X.inter"),
    Patch(_DATASET, ".paper_protocol:require_lists", "119", "benchmark files without histories fail much later"),
    Patch(_DATASET, ".behaviour:record_facts", "159, 853, 1796", "times are float32 and lists cut before a split"),
    Patch(_DATASET, ".paper_protocol:train_on_histories", "290-318", "general models see targets, no history"),
    Patch(_DATASET, ".behaviour:check_as_read", "427", "a damaged file gives shifted or invented values"),
    Patch(_SEQUENTIAL, ".paper_protocol:cut_lists", "154-165", "ready-made lists may have any length"),
    # Our model, dataset, trainer, settings and evaluation
    Patch(_CONFIG, "recbole_mllm.registration:remember_model_classes", "211-213", "asks for a class by name"),
    Patch(_UTILS, "recbole_mllm.registration:find_models", "55-110", "looks for models in its own folders"),
    Patch(_CONFIG, "recbole_mllm.registration:read_our_files", "238-317", "reads its own YAML files alone"),
    Patch("recbole.data.utils", "recbole_mllm.registration:prepare_data", "31, 140",
          "our dataset, built-in ones, frozen candidates and seeded negatives"),
    Patch(_COLLECTOR, "recbole_mllm.evaluation.stock_models:count_training", "79-94", "popularity differs by model"),
    Patch("recbole.model.general_recommender.pop", "recbole_mllm.evaluation.stock_models:count_all", "47",
          "counts an item of a batch once"),
    Patch("recbole.model.general_recommender.random", "recbole_mllm.evaluation.stock_models:score_by_pair", "38-45",
          "scores change with the batch", "Random"),
    Patch("recbole.model.layers", "recbole_mllm.features.item_vectors:read_vectors", "1246-1270", "no item vectors"),
    Patch("recbole.utils.case_study", "recbole_mllm.evaluation.loader:refuse_users_without_rows", "19-83",
          "fails for users without rows, unnamed"),
    Patch("recbole.trainer.trainer", "recbole_mllm.evaluation.loader:rank_without_ties", "463-524",
          "equal scores are ranked by where the label stands", "Trainer"),
    Patch("recbole.trainer.trainer", "recbole_mllm.evaluation.full_ranking:rank_all_items", "463-524",
          "a whole ranking loses the scores", "Trainer"),
)
# fmt: on


def apply() -> None:
    """Put every change in place: at once where its module has been imported, else as soon as it is."""
    if not any(isinstance(finder, MissingRecBoleFinder) for finder in sys.meta_path):
        sys.meta_path.append(MissingRecBoleFinder())
    fast = os.environ.get("RECBOLE_MLLM_FASTDATA") != "off"
    for patch in PATCHES:
        if fast or not patch.change.startswith((".fast_loading", ".used_ids")):
            (before_import if patch.before else after_import)(patch.module, patch.change_module)
