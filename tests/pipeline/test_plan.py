"""A plan counts what the run then does, and leaves no trace; what cannot be planned is one line and exit code 2."""

import json
import sqlite3
from contextlib import closing

import pytest
import small_world
import tiny_models

from recbole_mllm.arguments import Options, config_of
from recbole_mllm.cli import main
from recbole_mllm.quick_start import run

PROTOCOL = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Give the configuration of a plan, in a folder with the dataset."""
    place = tmp_path_factory.mktemp("plan")
    model = tiny_models.llava(place / "llava")
    small_world.write(place / "dataset")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield {
            "mllm": str(model),
            "prompt_style": "demo",
            "item_summary_tokens": 6,
            "user_summary_tokens": 8,
            "block_size": 2,
            "train_last_k": 2,
            "train_batch_size": 16,
            "limit_users": 12,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        }


@pytest.fixture(scope="module")
def plan(keys):
    """Give what makes a plan of changed keys and further words, each once."""
    known = {}

    def plan(*more, **changed):
        words = _words(keys | changed, *more)
        if str(words) not in known:
            assert main([*words, "--json", "plan.json"]) == 0
            with open("plan.json") as file:
                known[str(words)] = json.load(file)
        return known[str(words)]

    return plan


def _words(keys, *more):
    return ["plan", "--dataset", "steps", *(f"--{k}={json.dumps(v)}" for k, v in keys.items()), *more]


def _files(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_what_is_planned_is_what_the_run_records(keys, plan, tmp_path):
    folder = small_world.write(tmp_path / "data")
    keys = keys | {"data_path": str(tmp_path / "data"), "checkpoint_dir": str(tmp_path / "saved")}
    before = _files(tmp_path)
    stages = plan(**keys)["stages"]
    assert _files(tmp_path) == before
    outcome = run(config_of("MLLMMSR", "steps", Options(overrides=keys)))
    with closing(sqlite3.connect(folder / "steps.mllm.sqlite")) as db:
        query = "SELECT kind, COUNT(*), SUM(prompt_tokens), SUM(new_tokens) FROM answers GROUP BY kind"
        stored = {kind: numbers for kind, *numbers in db.execute(query)}
    read = stages["items"]["text_tokens"] + stages["items"]["image_tokens"]
    assert [stages["items"]["prompts"], read] == stored["item"][:2]
    # equal prompts are written once: a stand-in may make two prompts differ that the real text makes equal
    assert stages["users"]["prompts"] == pytest.approx(stored["user"][0], rel=0.1)
    # before anything is written, summaries are taken to be as long as they may be
    assert stages["items"]["new_tokens"] >= stored["item"][2] and stages["users"]["new_tokens"] >= stored["user"][2]
    assert [stages[name]["prompts"] for name in ("sft", "valid", "test")] == [12 * 2 * 2, 12 * 21, 12 * 21]
    before = _files(folder)
    known = plan("--debug", **keys)
    assert _files(folder) == before
    stages, disk = known["stages"], known["disk_bytes"]
    assert (stages["items"]["prompts"], stages["users"]["prompts"]) == (0, 0)
    assert stages["items"]["known"] == stored["item"][0] and stages["users"]["known"] >= stored["user"][0]
    read = sum(stages[name][kind] for name in ("valid", "test") for kind in ("text_tokens", "image_tokens"))
    assert read == outcome.model.tokens_read
    for kind in ("isum", "usum"):
        assert disk[kind] == pytest.approx(sum(path.stat().st_size for path in folder.glob(f"*.{kind}")), rel=0.15)
    saved = [outcome.checkpoint, *outcome.checkpoint.with_suffix("").iterdir()]
    assert disk["checkpoints"] == pytest.approx(sum(path.stat().st_size for path in saved), rel=0.25)
    trained = sum(p.numel() for p in outcome.model.parameters() if p.requires_grad)
    assert known["models"][keys["mllm"]]["trained"] == trained
    assert known["memory_bytes"]["sft"]["training_state"] == 16 * trained


def test_a_model_larger_than_a_card_is_told_how_to_split(plan, tmp_path, capsys):
    folder = tiny_models.llama(tmp_path / "large")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
               "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    large = {"mllm": str(folder), "use_image": False, "summary_mode": "none", "item_summary": "none",
             "gradient_checkpointing": True, "micro_batch_size": 1}  # fmt: skip
    found = plan("--device", "H100", **large)
    said = capsys.readouterr().out
    weights = found["memory_bytes"]["sft"]["weights"]
    assert 130e9 < weights < 145e9  # 70 billion in bfloat16
    for stage in ("sft", "test"):
        fit, total = found["fits"][stage], found["memory_bytes"][stage]["total"]
        count = fit["processes"]
        assert count >= 2 and fit["bytes"] < fit["room"] == 72e9 < total
        assert fit["bytes"] == pytest.approx(total - weights * (1 - 1 / count), rel=0.1)
        assert f"more than a H100's 72GB: fits when FSDP splits it among {count} processes" in said


def test_hours_are_operations_by_the_assumed_share_of_the_peak_and_chains_bound_many_nodes(plan):
    found = plan("--device", "a100-80gb")
    test, bill = found["stages"]["test"], found["bill"]
    assert test["seconds"] == pytest.approx(test["flops"]["total"] / (312e12 * 0.4))
    assert bill["wall_hours"] == pytest.approx(sum(bill["hours"].values()))
    assert bill["price"] is None and found["probe"] is None  # no price stands in devices.yaml
    assert all(one["processes"] == 1 for one in found["fits"].values())
    one, many = (plan("--device=H100", f"--nodes={n}", "--devices_per_node=8")["bill"] for n in (1, 1000))
    assert many["workers"] == 8000 and one["workers"] == 8
    assert many["hours"]["test"] == pytest.approx(one["hours"]["test"] / 1000)
    assert many["hours"]["users"] > one["hours"]["users"] / 1000


def test_costs_grow_with_the_work(plan):
    small, large = plan(), plan(limit_users=24, epochs=3, gradient_checkpointing=True)
    assert small["fits"] is small["bill"] is None
    for name, times in {"users": 2, "sft": 6, "valid": 6, "test": 2}.items():
        one, more = small["stages"][name], large["stages"][name]
        assert more["prompts"] == pytest.approx(times * one["prompts"], rel=0.05)
        assert more["flops"]["total"] > 0.9 * times * one["flops"]["total"]
    assert large["memory_bytes"]["sft"]["activations"] < small["memory_bytes"]["sft"]["activations"]


@pytest.mark.parametrize(
    ("mode", "more", "each"),
    [
        ("pop7", {}, 8),
        ("pop7", {"finetune": "lora", "epochs": 0}, 8),
        ("full", {"retriever": "Pop", "top_k": 9}, 9),
        ("full", {"full_sort": "brute"}, small_world.ITEMS),
    ],
)
def test_every_protocol_has_its_pairs(plan, mode, more, each):
    """With nothing to train and no summaries; validation has its own candidates."""
    more = {"finetune": "none", "summary_mode": "none"} | more
    found = plan(eval_args=PROTOCOL | {"mode": {"valid": "uni20", "test": mode}}, **more)
    counts = [found["stages"][name]["prompts"] for name in ("items", "users", "sft", "valid", "test")]
    assert counts == [0, 0, 0, 12 * 21, 12 * each] and "sft" not in found["memory_bytes"]


def test_the_ranking_of_all_items_beside_drawn_candidates_is_a_stage_of_its_own(plan):
    keys = {"finetune": "none", "summary_mode": "none"}
    alone = plan(**keys)["stages"]
    found = plan(**keys, retriever="Pop", top_k=9)
    assert found["stages"].pop("full_ranking")["prompts"] == 12 * 9
    assert found["stages"] == alone and any("a benchmark ranks all items" in line for line in found["assumptions"])


def test_servers_are_counted_and_not_timed(plan):
    server = "server:M@http://127.0.0.1:9/v1"
    found = plan("--device=H100", user_summarizer=server, item_summarizer=server)
    users = found["stages"]["users"]
    assert users["seconds"] is None and users["text_tokens"] > 10 * users["prompts"] > 0
    assert any(line.startswith("items, users ask servers") for line in found["assumptions"])
    assert set(found["bill"]["hours"]) == {"sft", "valid", "test"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--device", "H1000"], "did you mean H100"),
        (["--price_per_hour", "2"], "--price_per_hour is withdrawn"),
        (["--device", "H100", "--nodes", "0"], "--nodes is 0"),
        (["--mllm=nobody/no-such-model"], "reads its config, tokenizer and processor files"),
        (["--json", "no/such/plan.json"], "there is no folder"),
        (["--blok_size=3"], "block_size"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(keys, capsys, more, said):
    assert main(_words(keys, *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and not any("Traceback" in line for line in lines)
