"""A run in parts, as RecBole's quick start has them, and the keys of a quiet one."""

from pathlib import Path
from typing import Any

LOO = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}


def run_keys(place: Path, **more: Any) -> dict[str, Any]:
    """Return the keys of a quiet run on the dataset in ``place/data``, which saves in ``place/saved``."""
    load = {"inter": ["user_id", "item_id", "timestamp"]}
    own = {"data_path": str(place / "data"), "checkpoint_dir": str(place / "saved"), "load_col": load}
    return own | {"show_progress": False, "seed": 7} | more


def prepared(config: Any) -> tuple[Any, Any]:
    """Return the dataset, and the loaders of its parts with the digest of its candidates."""
    from recbole.data import create_dataset
    from recbole.utils import init_seed

    from recbole_mllm.evaluation.candidates import prepare_loaders

    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    return dataset, prepare_loaders(config, dataset)


def with_trainer(config: Any) -> tuple[Any, tuple[Any, Any, Any], Any]:
    """Return MLLMMSR, the loaders, and its trainer."""
    from recbole.utils import get_model, get_trainer, init_seed

    _, (*loaders, _) = prepared(config)
    init_seed(config["seed"], True)
    model = get_model("MLLMMSR")(config, loaders[0]._dataset)
    return model, tuple(loaders), get_trainer(config["MODEL_TYPE"], "MLLMMSR")(config, model)
