"""What each row's prompt has read, told by a server that answers with the items it was shown."""

import re
from collections import Counter

from planned_server import Planned, completion, serving

from recbole_mllm.common.settings import Settings
from recbole_mllm.quick_start import make_config
from recbole_mllm.summaries.controls import controlled
from recbole_mllm.summaries.user_summaries import SummaryRequests

EVALUATION = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni3"}


def echoing():
    """Return a server, to be entered, whose answers name the items that stand in the question."""
    return serving(Planned(lambda n, text: completion(" ".join(f"item-{item}" for item in shown(text)))))


def shown(text):
    """Return the items whose titles stand in `text`, in order."""
    return re.findall(r"item-(\w+)", text)


def read(text):
    """Return the items a recommender's prompt has read: the first it names is the candidate."""
    return shown(text)[1:]


def told(rows):
    return Counter((user, target, tuple(items)) for user, target, items in rows)


def write_items(folder, items, field="item_id"):
    lines = [f"{field}:token\ttitle:token_seq", *(f"{item}\titem-{item}" for item in sorted(items))]
    (folder / f"{folder.name}.item").write_text("\n".join(lines) + "\n")


def prompts_of(folder, url, **keys):
    """Return (user, target, prompt) of the target's row, for all rows of the three parts, as a run makes them."""
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model

    from recbole_mllm.model.summarizers import make_summary_setup
    from recbole_mllm.summaries.preferences import refresh

    base = {
        "data_path": str(folder.parent), "mllm": f"server:m@{url}", "finetune": "none", "use_image": False,
        "item_summary": "none", "prompt_style": "demo", "eval_args": EVALUATION, "show_progress": False,
        "MAX_ITEM_LIST_LENGTH": 2, "block_size": 2, "summary_temperature": 0.0,
    }  # fmt: skip
    config = make_config("MLLMMSR", folder.name, [], base | keys)
    dataset = create_dataset(config)
    loaders = data_preparation(config, dataset)
    train, settings = loaders[0]._dataset, Settings.from_config(config)
    # zero-shot reads no summaries for training rows, and here those are looked at too
    every = controlled(SummaryRequests(train.histories, train.positions), settings.summary)
    setup = make_summary_setup(config, settings, config["device"])
    model = get_model("MLLMMSR")(config, train, refresh(setup, every)[0])
    found = []
    for loader in loaders:
        rows = loader._dataset.inter_feat
        fields = (dataset.uid_field, dataset.iid_field)
        users, items = (dataset.id2token(field, rows[field].numpy()) for field in fields)
        texts = [prompt.text for prompt in model.prompts_of(model.rows_of(rows))]
        found += zip(map(str, users), map(str, items), texts, strict=True)
    return found
