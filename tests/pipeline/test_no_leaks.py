"""Through RecBole's own splits: no row's summary has read the row's target, nor anything later, whatever the split."""

import random

import pytest
import yaml
from planted_writers import Planted
from stock_forward import STYLE

from recbole_mllm.cli import main
from recbole_mllm.common.settings import Settings
from recbole_mllm.data.item_table import Items
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.quick_start import make_config
from recbole_mllm.summaries.generator import CachedGenerator
from recbole_mllm.summaries.preferences import Preferences
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.user_summaries import SummaryRequests, preferences

SPLITS = {
    "leave-one-out": {"LS": "valid_and_test"},
    "leave-one-out, test only": {"LS": "test_only"},
    "ratio by user": {"RS": [0.6, 0.2, 0.2]},
    "paper": None,
}


def write_world(folder, seed, protocol):
    """Write 24 users with 2 to 14 interactions in minutes of one another, so that float32 time cannot order them."""
    rng = random.Random(seed)
    exact, rows = {}, []
    for user in range(24):
        times = rng.sample(range(1_700_000_000, 1_700_003_000), rng.randrange(2, 15))
        exact[f"u{user}"] = [f"u{user}i{n}" for n in range(len(times))]
        rows += [(t, f"u{user}", item) for t, item in zip(sorted(times), exact[f"u{user}"], strict=True)]
    rng.shuffle(rows)
    (folder / "raw").mkdir()
    (folder / "raw" / "log.csv").write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for t, u, i in rows))
    words = ["convert", "csv", "--raw", str(folder / "raw"), "--out", str(folder / "made"), "--protocol", protocol]
    assert main(words) == 0
    return exact


def markers(text):
    return {word.strip(".,:") for word in text.split() if word.startswith("seen-")}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_what_a_row_reads_is_what_lies_before_its_target(tmp_path, split, seed):
    from recbole.data import create_dataset

    exact = write_world(tmp_path, seed, "paper" if split == "paper" else "loo")
    arguments = {"order": "TO", "group_by": "user", "mode": "uni5", "split": SPLITS[split] or {"LS": "valid_and_test"}}
    keys = {"data_path": str(tmp_path), "eval_args": arguments, "block_size": 1 + seed, "MAX_ITEM_LIST_LENGTH": 4}
    keys |= {"partial_block": seed != 2, "item_summary": "none", "max_history": None, "mllm": "tiny"}
    settings_file = yaml.safe_load((tmp_path / "made" / "dataset.yaml").read_text())
    config = make_config("MLLMMSR", "made", [], {**keys, "load_col": settings_file["load_col"]})
    settings = Settings.from_config(config).summary
    parts = create_dataset(config).build()
    plan = SummaryRequests(parts[0].histories, parts[0].positions)
    items = Items({item: f"seen-{item}" for own in exact.values() for item in own}, {})
    echo = Planted(lambda prompt: " ".join(sorted(markers(prompt.text))))
    store = Store(tmp_path / "store.sqlite")
    texts = preferences(
        CachedGenerator("user", lambda: echo, "echo", store, Decoding(9)), STYLE, items, {}, plan, settings
    )
    store.close()
    known, rows, read = Preferences(texts, plan, items, STYLE, settings), 0, 0
    for part in parts:
        feat = part.inter_feat
        users = part.id2token("user_id", feat["user_id"].numpy())
        targets = part.id2token("item_id", feat["item_id"].numpy())
        for user, target, position in zip(users, targets, feat["_position"].tolist(), strict=True):
            place = exact[user].index(target)
            assert position == place
            seen = markers(known.of(str(user), position))
            stop = place if settings.partial_block else place - place % settings.block_size
            assert seen == {f"seen-{item}" for item in exact[user][:stop]}
            rows, read = rows + 1, read + bool(seen)
    assert rows and read > rows // 2
    assert len(texts) == len({(u, s) for u, s in texts}) and echo.asked <= sum(map(len, exact.values()))
