"""A plan counts what the run then does, and leaves no trace; what cannot be planned is one line and exit code 2."""

import json
import sqlite3
import sys

import pytest
import small_world
import tiny_models

from recbole_mllm.cli import main
from recbole_mllm.cli.arguments import Options, config_of
from recbole_mllm.quick_start import run

PROTOCOL = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def keys(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x"])
    small_world.write(tmp_path / "dataset")
    return {
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


def _words(keys):
    return ["plan", "--dataset", "steps", *(f"--{k}={json.dumps(v)}" for k, v in keys.items())]


def _plan(keys, *more):
    assert main([*_words(keys), *more, "--json", "plan.json"]) == 0
    with open("plan.json") as file:
        return json.load(file)


def _files(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_a_model_larger_than_a_card_is_told_how_to_split(keys, tmp_path, capsys):
    folder = tiny_models.llama(tmp_path / "large")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
               "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    large = keys | {"mllm": str(folder), "use_image": False, "summary_mode": "none", "item_summary": "none",
                    "gradient_checkpointing": True, "micro_batch_size": 1}  # fmt: skip
    plan = _plan(large, "--device", "H100")
    said = capsys.readouterr().out
    weights = plan["memory_bytes"]["sft"]["weights"]
    assert 130e9 < weights < 145e9  # 70 billion in bfloat16
    for stage in ("sft", "test"):
        found, total = plan["fits"][stage], plan["memory_bytes"][stage]["total"]
        count = found["processes"]
        assert count >= 2 and found["bytes"] < found["room"] == 72e9 < total
        assert found["bytes"] == pytest.approx(total - weights * (1 - 1 / count), rel=0.1)
        assert f"more than a H100's 72GB: fits when FSDP splits it among {count} processes" in said
    assert _plan(keys)["fits"] is None
    assert all(one["processes"] == 1 for one in _plan(keys, "--device", "H100")["fits"].values())


def test_what_is_planned_is_what_the_run_records(keys, tmp_path, capsys):
    folder = tmp_path / "dataset" / "steps"
    before = _files(folder)
    guessed = _plan(keys)
    assert _files(folder) == before and sorted(p.name for p in tmp_path.iterdir()) == ["dataset", "plan.json"]
    outcome = run(config_of("MLLMMSR", "steps", Options(overrides=keys)))
    with sqlite3.connect(folder / "steps.mllm.sqlite") as db:
        query = "SELECT kind, COUNT(*), SUM(prompt_tokens), SUM(new_tokens) FROM answers GROUP BY kind"
        stored = {kind: numbers for kind, *numbers in db.execute(query)}
    db.close()
    stages = guessed["stages"]
    assert (stages["items"]["prompts"], stages["items"]["text_tokens"] + stages["items"]["image_tokens"]) == tuple(
        stored["item"][:2]
    )
    # equal prompts are written once: a stand-in may make two prompts differ that the real text makes equal
    assert stages["users"]["prompts"] == pytest.approx(stored["user"][0], rel=0.1)
    # before anything is written, summaries are taken to be as long as they may be
    assert stages["items"]["new_tokens"] >= stored["item"][2] and stages["users"]["new_tokens"] >= stored["user"][2]
    asked = [stages[name]["prompts"] for name in ("valid", "test")]
    assert asked == [12 * 21] * 2 and stages["sft"]["prompts"] == 12 * 2 * 2
    before = _files(folder)
    known = _plan(keys)
    assert _files(folder) == before
    stages = known["stages"]
    assert (stages["items"]["prompts"], stages["users"]["prompts"]) == (0, 0)
    assert stages["items"]["known"] == stored["item"][0] and stages["users"]["known"] >= stored["user"][0]
    read = sum(stages[name][kind] for name in ("valid", "test") for kind in ("text_tokens", "image_tokens"))
    assert read == outcome.model.tokens_read
    for kind in ("isum", "usum"):
        size = sum(path.stat().st_size for path in folder.glob(f"*.{kind}"))
        assert known["disk_bytes"][kind] == pytest.approx(size, rel=0.15)
    saved = [outcome.checkpoint, *outcome.checkpoint.with_suffix("").iterdir()]
    assert known["disk_bytes"]["checkpoints"] == pytest.approx(sum(path.stat().st_size for path in saved), rel=0.25)
    trained = sum(p.numel() for p in outcome.model.parameters() if p.requires_grad)
    assert known["models"][keys["mllm"]]["trained"] == trained
    assert known["memory_bytes"]["sft"]["training_state"] == 16 * trained


def test_hours_are_operations_by_the_assumed_share_of_the_peak(keys):
    plan = _plan(keys, "--device", "a100-80gb")
    flops, seconds = plan["stages"]["test"]["flops"]["total"], plan["stages"]["test"]["seconds"]
    assert seconds == pytest.approx(flops / (312e12 * 0.4))
    bill = plan["bill"]
    assert bill["wall_hours"] == pytest.approx(sum(bill["hours"].values()))
    assert bill["price"] is None and plan["probe"] is None  # no price stands in devices.yaml


def test_many_nodes_are_bounded_by_the_longest_chain(keys):
    one, many = (_plan(keys, "--device=H100", f"--nodes={n}", "--devices_per_node=8") for n in (1, 1000))
    assert many["bill"]["workers"] == 8000 and one["bill"]["workers"] == 8
    assert many["bill"]["hours"]["test"] == pytest.approx(one["bill"]["hours"]["test"] / 1000)
    assert many["bill"]["hours"]["users"] > one["bill"]["hours"]["users"] / 1000


def test_costs_grow_with_the_work(keys):
    small, large = _plan(keys), _plan(keys | {"limit_users": 24})
    for name in ("users", "sft", "valid", "test"):
        assert large["stages"][name]["flops"]["total"] > small["stages"][name]["flops"]["total"]
    assert _plan(keys | {"epochs": 3})["stages"]["sft"]["prompts"] == 3 * small["stages"]["sft"]["prompts"]
    checkpointed = _plan(keys | {"gradient_checkpointing": True})["memory_bytes"]["sft"]["activations"]
    assert checkpointed < small["memory_bytes"]["sft"]["activations"]


def test_every_protocol_has_its_pairs(keys):
    def modes(mode):
        return keys | {"eval_args": PROTOCOL | {"mode": {"valid": "uni20", "test": mode}}}

    assert _plan(modes("uni5"))["stages"]["test"]["prompts"] == 12 * 6
    assert _plan(modes("pop7"))["stages"]["test"]["prompts"] == 12 * 8
    full = modes("full")
    assert _plan(full | {"retriever": "Pop", "top_k": 9})["stages"]["test"]["prompts"] == 12 * 9
    assert _plan(full | {"full_sort": "brute"})["stages"]["test"]["prompts"] == 12 * small_world.ITEMS


def test_a_zero_shot_run_trains_nothing(keys):
    plan = _plan(keys | {"finetune": "none", "summary_mode": "none"})
    assert [plan["stages"][name]["prompts"] for name in ("items", "users", "sft")] == [0, 0, 0]
    assert plan["stages"]["valid"]["prompts"] == 12 * 21 and "sft" not in plan["memory_bytes"]


def test_servers_are_counted_and_not_timed(keys):
    served = {"user_summarizer": "server:M@http://127.0.0.1:9/v1", "item_summarizer": "server:M@http://127.0.0.1:9/v1"}
    plan = _plan(keys | served, "--device=H100")
    users = plan["stages"]["users"]
    assert users["seconds"] is None and users["text_tokens"] > 10 * users["prompts"] > 0
    assert any(line.startswith("items, users ask servers") for line in plan["assumptions"])
    assert set(plan["bill"]["hours"]) == {"sft", "valid", "test"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--device", "H1000"], "did you mean H100"),
        (["--device", "H100", "--probe"], "--probe is withdrawn"),
        (["--price_per_hour", "2"], "--price_per_hour is withdrawn"),
        (["--requests_per_s=10"], "--requests_per_s is withdrawn"),
        (["--device", "H100", "--nodes", "0"], "--nodes is 0"),
        (["--mllm=nobody/no-such-model"], "reads its config, tokenizer and processor files"),
        (["--json", "no/such/plan.json"], "there is no folder"),
        (["--blok_size=3"], "block_size"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(keys, capsys, more, said):
    assert main([*_words(keys), *more]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert said in told[-1] and not any("Traceback" in line for line in told)
