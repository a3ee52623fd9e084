"""`inspect` counts what was planted, tells what to do about it, and starts without torch or RecBole."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError
from recbole_mllm.inspect.findings import findings
from recbole_mllm.inspect.health_page import format_health, health_page
from recbole_mllm.inspect.measure import measure

INTER = "user_id:token\titem_id:token\ttimestamp:float\n"
ITEM = "item_id:token\ttitle:token_seq\timage:token\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def plant(folder: Path, inter: str, item: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{folder.name}.inter").write_text(INTER + inter, encoding="utf-8")
    if item is not None:
        (folder / f"{folder.name}.item").write_text(ITEM + item, encoding="utf-8")
    return folder


def sound(folder: Path, inter: str = "", item: str = "") -> Path:
    """Four users with four of eight items each, with titles and images; the rows `inter` and `item` stand behind."""
    rows = [f"u{u}\ti{(u + n) % 8}\t{1_700_000_000 + 240 * n + 60 * u}" for n in range(4) for u in range(4)]
    items = [f"i{n}\ttitle {n}\timages/{n}.png" for n in range(7)]
    (folder / "images").mkdir(parents=True)
    for n in range(7):
        Image.new("RGB", (2, 2)).save(folder / "images" / f"{n}.png")
    return plant(folder, "\n".join(rows) + "\n" + inter, "\n".join(items) + "\n" + item)


def told(folder: Path) -> str:
    return "\n".join(f"{finding.what} {finding.todo}" for finding in findings(measure(folder)))


def test_a_sound_dataset_has_nothing_to_warn_of(tmp_path):
    health = measure(sound(tmp_path / "s"))
    assert findings(health) == [] and "nothing to warn of" in format_health(health)
    assert health.n_interactions == 16 and health.density == 16 / 28 and health.lengths.tolist() == [4] * 4
    assert health.popularity.tolist() == [1, 1, 2, 2, 3, 3, 4]
    assert health.times == (1_700_000_000, 1_700_000_900) and health.found["ties"].count == 0


def test_the_summaries_of_a_dataset_are_named_by_their_tags(tmp_path):
    folder = sound(tmp_path / "s.x")
    health = measure(folder)
    assert "summaries  none" in re.sub(" +", "  ", format_health(health))
    for name in ("s.x.tiny-b4-0a.isum", "s.x.tiny-b4-0a.usum", "s.x.qwen2-5-1b.isum", "other.tag.isum"):
        (folder / name).touch()
    said = "qwen2-5-1b (items); tiny-b4-0a (items, users)"
    health = measure(folder)
    assert said in format_health(health) and f"<td>{said}</td>" in health_page(health)


SICK = {
    "a quote": ("", 'i9\t"Q" and A\t\n', r"1 value starts with a quote, the first: x\.item:9: '\"Q\" and A'"),
    "an empty user": ("\ti1\t5\n\ti2\t6\n\ti3\t6\n", "", "1 id does not survive .* the first: user '' is"),
    "[PAD]": ("u0\t[PAD]\t5\n", "[PAD]\tt\t\n", r"item '\[PAD\]' is \[PAD\], which RecBole reserves"),
    "alike": ("U0\ti1\t5\nU0\ti2\t5\nU0\ti3\t5\n", "", "1 user id differs from another only .*'u0' and 'U0'"),
    "outer space": ("u0\t i1\t5\n", " i1\tx\t\n", "1 item id differs from another only .*'i1' and ' i1'"),
    "invisible": ("u0\ti\u200b9\t5\n", "i\u200b9\tx\t\n", "1 id holds invisible characters"),
    "unlisted": ("u0\tnew\t5\n", "", "1 item with interactions has no row in .item, the first: 'new'"),
    "identical lines": ("u0\ti0\t1700000000\n", "", "1 line repeats an earlier one"),
    "pairs": ("u0\ti1\t9\n", "", "1 interaction repeats an earlier one .*user 'u0' and item 'i1'"),
    "no time": ("u0\ti4\t\nu1\ti5\tNA\n", "", "2 interactions have no time"),
    "few": ("new\ti1\t5\n", "", r"1 user has fewer than 3 interactions \(20\.0 %\)"),
    "item twice": ("", "i1\tagain\t\n", "1 item stands twice in .item, the first: 'i1' in lines 3 and 9"),
    "no title": ("", "i9\t\t\n", "1 item has no title"),
    "long title": ("", f"i9\t{'long ' * 300}\t\n", r"1 title is longer than 1,000 .* 1,499 characters of item 'i9'"),
    "same title": ("", "i9\ttitle 1\t\n", "1 item has the title of another, the first: 'i1' and 'i9' are both 'title"),
    "no image": ("", "i9\tt\timages/none.png\n", r"1 image cannot be used, .* images/none.png does not exist"),
    "outside": ("", "i9\tt\t../x.png\n", r"item 'i9': \.\./x\.png leads out of the folder"),
}


@pytest.mark.parametrize("what", SICK)
def test_what_was_planted_is_told_with_count_and_example(tmp_path, what):
    inter, item, expected = SICK[what]
    found = told(sound(tmp_path / "x", inter, item)).splitlines()
    assert [line for line in found if re.search(expected, line)], found
    assert len(found) <= 2, "a single ill brings no others but its own consequence"


def test_the_order_is_that_of_recboles_own_dataset(tmp_path):
    """Times near 1.7e9 in random rows: float32 has steps of 128 there."""
    from recbole.config import Config
    from recbole.data import create_dataset

    rng = np.random.default_rng(3)
    rows = [(f"u{rng.integers(20)}", f"i{n}", 1_700_000_000 + int(rng.integers(900))) for n in range(300)]
    folder = plant(tmp_path / "x", "".join(f"{u}\t{i}\t{t}\n" for u, i, t in rows))
    config = Config("BPR", "x", config_dict={"data_path": str(tmp_path), "gpu_id": "", "load_col": None})
    dataset = create_dataset(config)
    dataset._change_feat_format()
    dataset.sort(by=["user_id", "timestamp"], ascending=True)
    users, items = (dataset.id2token(name, dataset.inter_feat[name]) for name in ("user_id", "item_id"))
    order = {user: items[users == user].tolist() for user in set(users)}
    exact = {user: [i for u, i, t in sorted(rows, key=lambda row: row[2]) if u == user] for user in order}
    changed = [user for user in order if order[user] != exact[user]]
    found = measure(folder).found
    assert found["reordered"].count == len(changed) > 5 and found["reordered"].example[6:-1] in changed
    assert found["other_last"].count == sum(order[user][-1] != exact[user][-1] for user in order) > 0


def test_benchmark_files_are_read_as_histories(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    head = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    (folder / "x.train.inter").write_text(head + "u1\ta\tb\nu1\ta b\tc\nu2\tb\ta\n")
    (folder / "x.valid.inter").write_text(head + "u3\tc a\td\n")
    (folder / "x.test.inter").write_text(head + "u4\ta\te\n")
    health = measure(folder)
    assert (len(health.lengths), len(health.popularity), health.n_interactions) == (4, 5, 3 + 2 + 3 + 2)
    assert "in histories and targets" in format_health(health) and "no usable time" not in told(folder)


def test_dataset_yaml_names_columns_files_and_images(tmp_path):
    folder = plant(tmp_path / "x", "")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "photos" / "a.png")
    (folder / "x.all.inter").write_text("who:token\twhat:token\twhen:float\nu\ta\t2\nu\tb\t1\n")
    (folder / "dataset.yaml").write_text(
        "USER_ID_FIELD: who\nITEM_ID_FIELD: what\nTIME_FIELD: when\nbenchmark_filename: [all]\nimage_dir: photos\n"
    )
    health = measure(folder)
    assert (len(health.lengths), len(health.popularity), len(health.items.images.found)) == (1, 2, 1)
    assert health.times == (1, 2)
    (folder / "dataset.yaml").write_text("benchmark_filename: [gone]\n")
    with pytest.raises(UserError, match=r"x\.gone\.inter does not exist"):
        measure(folder)
    (folder / "dataset.yaml").write_text("a: [\n")
    with pytest.raises(UserError, match=r"dataset\.yaml:2: it is no valid YAML"):
        measure(folder)


def test_images_by_id_are_counted_and_the_missing_ones_listed(tmp_path, capsys):
    folder = plant(tmp_path / "x", "u\ta\t1\nu\tb\t2\nu\tc\t3\n", "a\tA\t\nb\tB\t\nd\tD\t\n")
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (2, 2)).save(photos / "a.jpg")
    (photos / "b.jpg").write_bytes(b"<html>")
    assert main(["inspect", "x", "--image_dir", "photos"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 4 (25.0 %)" in shown and "1 image cannot be used" in shown and "2 items have no image" in shown
    lines = (folder / "missing_images.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[0] for line in lines] == ["b", "d", "c"] and "HTML page" in lines[0]


def test_images_that_convert_left_out_stay_listed_until_they_are_there(tmp_path, capsys):
    folder = plant(tmp_path / "x", "u\ta\t1\nu\tb\t2\nu\tc\t3\n", "a\tA\t\nb\tB\t\nd\tD\t\n")
    listed = folder / "missing_images.tsv"
    listed.write_text(text := "item_id\tpath\treason\na\ta.jpg\tis truncated\nb\tb.jpg\tdoes not exist\n")
    assert main(["inspect", "x"]) == 0 and listed.read_text() == text and "missing images: x" in capsys.readouterr().out
    Image.new("RGB", (2, 2)).save(folder / "a.jpg")
    (folder / "x.item").write_text("item_id:token\ttitle:token_seq\timage:token\na\tA\ta.jpg\nd\tD\t\n")
    assert main(["inspect", "x"]) == 0 and listed.read_text().count("\n") == 1  # b is gone
    assert "missing images" not in capsys.readouterr().out


def test_a_dataset_is_given_by_folder_or_by_name(tmp_path, capsys):
    sound(tmp_path / "dataset" / "s")
    for words in (["s"], ["dataset/s"], ["dataset/s/"], [str(tmp_path / "dataset/s")], ["s", "--data_path=dataset"]):
        assert main(["inspect", *words]) == 0
    (tmp_path / "s").mkdir()  # the raw files are often in a folder of the same name
    (tmp_path / "s" / "raw.csv").write_text("user,item\n")
    assert main(["inspect", "s"]) == 0 and main(["split", "s", "--protocol", "loo", "--out", "dataset/again"]) == 0
    assert (tmp_path / "dataset" / "s" / "inspect.html").is_file()
    for _ in range(2):  # the second time over its own page
        assert main(["inspect", "s", "--output", "out/page.html"]) == 0
    assert (tmp_path / "out" / "page.html").is_file() and "page: out/page.html" in capsys.readouterr().out
    (sound(tmp_path / "t") / "inspect.html").mkdir()
    assert main(["inspect", "t"]) == 0
    assert "page: not written" in (shown := capsys.readouterr().out) and "--output=FILE.html" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("inspect", "directory"),
        ("inspect nothing", "no dataset 'nothing'"),
        ("inspect .", "is none itself"),
        ("inspect odd", "odd holds no odd.inter; it holds other.inter"),
        ("inspect good --image_dir none", "image_dir none is no folder"),
        ("inspect good --epochs=3", "inspect takes no --epochs"),
        ("inspect good --output /proc/x.html", "--output /proc/x.html cannot be written"),
    ],
)
def test_what_is_no_dataset_or_cannot_be_read_is_exit_code_2(tmp_path, words, message, capsys):
    plant(tmp_path / "odd", "").joinpath("odd.inter").rename(tmp_path / "odd" / "other.inter")
    sound(tmp_path / "good")
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_page_draws_every_user_and_interaction_and_escapes_what_the_data_say(tmp_path):
    html = health_page(measure(sound(tmp_path / "s")))
    users = re.findall(r"interactions: (\d+) users?</title>", html)
    moments = re.findall(r": (\d+) interactions?</title>", html)
    assert sum(map(int, users)) == 4 and sum(map(int, moments)) == 16 and html.count("<polyline") == 1
    evil = "<script>alert(1)</script>"
    folder = plant(tmp_path / "x", f"u\t{evil}\t1\nU\t{evil}\t2\n", f"a\t{evil}\t\nb\t{evil}\t\n")
    html = health_page(measure(folder))
    assert evil not in html and "&lt;script&gt;" in html and "http" not in html
    empty = measure(plant(tmp_path / "e", ""))
    assert empty.n_interactions == 0 and "users" in format_health(empty) and "<svg" not in health_page(empty)


def test_inspect_starts_without_torch_recbole_or_pandas(tmp_path):
    sound(tmp_path / "s")
    code = (
        "import sys; from recbole_mllm.cli import main; main(['inspect', 's'])\n"
        "print([m for m in ('torch', 'recbole', 'pandas', 'transformers', 'scipy') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(root)})
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
