"""Settings: every shipped file parses, a wrong value or unknown key is one line that helps."""

import pytest
import yaml

from recbole_mllm.config import benchmark_defaults, check_values, config_paths, per_model
from recbole_mllm.errors import UserError
from recbole_mllm.keys import check_keys
from recbole_mllm.resources import PROPERTIES, named, resource
from recbole_mllm.settings import Settings, known_keys

BASE = yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text())
PRESETS = {"demo", "ml-100k-posters", "microlens", "amazon2023", "paper", "llava-1.6-mistral-7b", "qwen2.5-vl-7b"}


def test_every_preset_the_design_names_is_there_and_parses():
    assert PRESETS | {"smolvlm-256m"} <= set(named("quick_start_config"))
    for name in named("quick_start_config"):
        Settings.from_config(BASE | yaml.safe_load(resource("quick_start_config", name).read_text()))


def test_every_setting_stands_in_a_shipped_file_with_a_comment():
    text = (PROPERTIES / "model" / "MLLMMSR.yaml").read_text() + (PROPERTIES / "overall.yaml").read_text()
    missing = [key for key in known_keys() - {"note", "per_model"} if f"\n{key}:" not in f"\n{text}"]
    assert missing == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora_r", "eight", "lora_r is 'eight'; it must be a whole number, at least 1"),
        ("lora_r", True, "lora_r is True"),
        ("lora_r", 0, "lora_r is 0; it must be a whole number, at least 1"),
        ("lora_dropout", 1, "lora_dropout is 1; it must be a number, at least 0 and below 1"),
        ("lora_dropout", -0.1, "lora_dropout is -0.1; it must be a number, at least 0"),
        ("summary_mode", "recurent", "must be one of recurrent, direct, none"),
        ("block_size", 0, "block_size is 0; it must be a whole number, at least 1"),
        ("use_image", "yes", "use_image is 'yes'; it must be true or false"),
        ("train_last_k", 1.5, "train_last_k is 1.5; it must be a whole number, at least 1, or null"),
    ],
)
def test_a_wrong_value_names_its_key(key, value, message):
    with pytest.raises(UserError, match=message):
        Settings.from_config(BASE | {key: value})


NAN, INF = float("nan"), float("inf")
WRONG = {
    "block_size": (0, -1, 1.5, NAN, INF, True, "3", None, 10**30),
    "max_history": (0, -3, 2.5, NAN, False),
    "history_titles": (0, -5, None),
    "train_last_k": (0, -1, True),
    "lora_r": (0, -8, INF),
    "lora_alpha": (0, -16, 0.5, True),
    "lora_dropout": (1, -0.1, NAN, True),
    "max_text_tokens": (0, -1, INF),
    "item_summary_tokens": (0, -200, 0.5),
    "user_summary_tokens": (0, -256, NAN),
    "summary_temperature": (-0.1, NAN, INF, True, None),
    "summary_top_p": (0, 1.1, NAN),
    "summary_seed": (-1, 2**32, 1.5),
    "summarize_batch_size": (0, -64),
    "server_concurrency": (0, 10**6),
    "server_timeout": (0, -1, INF, NAN, 10**9),
    "server_patience": (0, INF, None),
    "gradient_accumulation_steps": (0, True),
    "warmup_ratio": (-0.1, 1.1, NAN),
    "micro_batch_size": (0,),
    "checkpoint_every_steps": (0, -1),
    "top_k": (0, -20),
    "fusion": (-0.1, 1.5, NAN, True, "many"),
    "candidate_seed": (-1, 2**32, None, True),
    "limit_users": (0, -3, 0.5, True),
    "feature_size": (0, -1),
    "use_image": (1, "yes", None),
    "mllm": ("", " ", 5, None, "a\0b"),
    "resume": ("", 5),
    "epochs": (-1, None, 0.5, NAN, True, "3"),
    "train_batch_size": (0, -1, 1.5),
    "eval_batch_size": (0, INF),
    "learning_rate": (0, -1e-3, NAN, INF, True, "fast"),
    "weight_decay": (-0.1, NAN),
    "stopping_step": (-1, None),
    "eval_step": (-1,),
    "metric_decimal_place": (-1, 0.5),
    "loss_decimal_place": (-1,),
    "worker": (-1,),
    "seed": (-1, 2**32, NAN, True),
    "MAX_ITEM_LIST_LENGTH": (0, -50, 1.5),
    "topk": ([], [0], [5, -1], 0, "5", [True], {}),
    "metrics": ([], 5, [5]),
    "valid_metric": (5, None),
    "device": ("gpu", 7, "cuda:x"),
    "eval_args": (
        5, {"mode": "uni0"}, {"mode": "uni-5"}, {"mode": "pop"}, {"mode": {"test": "unix"}}, {"mode": 20},
        {"split": {"RS": [0.8, -0.1, 0.3]}}, {"split": {"RS": [0, 0, 0]}}, {"split": {"RS": ["a"]}},
    ),
    "train_neg_sample_args": ({"sample_num": 0}, {"sample_num": True}, {"alpha": NAN}, {"candidate_num": -1}),
    "show_progress": ("False", "maybe", 2),
    "use_gpu": ("maybe",),
    "checkpoint_dir": ("", None, 5),
    "field_separator": ("",),
    "user_inter_num_interval": (5, "[x,inf)", "5", "[5,inf", "[3,1]", ""),
    "val_interval": ("[3,inf)", {"rating": "3"}, {"rating": 3}, {"rating": None}),
    "rm_dup_inter": ("middle", False, True),
    "load_col": ([], ["user_id"], {"iter": ["user_id"]}, {"inter": "user_id"}, {"inter": []}, {"inter": None}),
    "benchmark_filename": ("train", [], [1, 2]),
    "clip_grad_norm": (5, {"max_norm": 0}, {"max_norm": NAN}, {"max_norm": True}),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_a_number_out_of_its_range_names_key_value_range_and_place(key):
    for value in WRONG[key]:
        with pytest.raises(UserError) as found:
            check_values({key: value}, lambda key: "my.yaml:3")
        words = str(found.value)
        assert words.startswith(key) and "; it must be " in words and words.endswith(" (my.yaml:3)"), value
        assert "\n" not in words and len(words) < 300


def test_what_recboles_own_documentation_writes_is_taken():
    """From its guide and its published configurations; a stricter check must not refuse what has always run."""
    check_values(
        {
            "load_col": {"inter": ["user_id", "item_id"], "kg": ["head_id"], "item": "*", "user": []},
            "unload_col": {"inter": ["timestamp"]}, "user_inter_num_interval": "[0,1];(10, inf)",
            "item_inter_num_interval": None, "rm_dup_inter": "last", "benchmark_filename": ["train", "valid", "test"],
            "val_interval": {"rating": "[3,inf)", "timestamp": "[1356969600, 1404144000)", "genre": ["Drama"]},
            "field_separator": "\t", "show_progress": False, "normalize_all": None, "checkpoint_dir": "saved",
        }
    )  # fmt: skip


def test_every_number_of_ours_has_a_range_and_every_default_is_in_it():
    from dataclasses import fields
    from typing import Annotated, get_args, get_origin, get_type_hints

    from recbole_mllm import settings

    for group in settings._GROUPS:
        for key, hint in get_type_hints(group, include_extras=True).items():
            kinds = {hint, *(get_args(hint) if get_origin(hint) is not Annotated else ())}
            assert not {int, float} & kinds, f"{key} of {group.__name__} is a number without a range"
        assert {field.name for field in fields(group)} <= known_keys()
    shipped = yaml.safe_load((PROPERTIES / "overall.yaml").read_text())
    check_values(BASE | shipped | shipped["benchmark_defaults"])


def test_numbers_at_the_ends_of_their_ranges_are_taken():
    check_values({"lora_dropout": 0, "warmup_ratio": 1, "summary_temperature": 0, "fusion": 1, "limit_users": 1,
                  "candidate_seed": 2**32 - 1, "block_size": 3.0, "topk": 5, "epochs": 0, "eval_step": 0,
                  "eval_args": {"mode": {"valid": "uni1", "test": "labeled"}, "split": {"RS": [8, 1, 1]}}})  # fmt: skip


def test_a_bare_off_in_yaml_is_off():
    assert Settings.from_config(BASE | yaml.safe_load("summarize: off")).summary.summarize == "off"


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match="unknown key 'lora_rnk' in my.yaml; did you mean 'lora_"):
        check_keys(["lora_rnk"], "my.yaml")
    check_keys(["learning_rate", "hidden_size", "lora_r", "eval_args"], "my.yaml")


def test_config_files_may_be_presets_and_are_checked(tmp_path):
    assert config_paths(["demo"]) == [str(resource("quick_start_config", "demo"))]
    (tmp_path / "c.yaml").write_text("epohcs: 3\n")
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        config_paths([str(tmp_path / "c.yaml")])
    with pytest.raises(UserError, match="is no preset; presets: .*demo"):
        config_paths(["dmeo"])


def test_a_section_for_one_model_is_read_for_it_alone(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("per_model: {SASRec: {epochs: 3, hidden_size: 8}}")
    two.write_text("per_model: {SASRec: {epochs: 4}}")
    assert per_model([str(one), str(two)], "SASRec") == {"epochs": 4, "hidden_size": 8}
    assert per_model([str(one)], "GRU4Rec") == {}
    two.write_text("per_model: {SASRec: {epcohs: 4}}")
    words = "unknown key 'epcohs' in .*two.yaml:1, per_model, SASRec; did you mean 'epochs'"
    with pytest.raises(UserError, match=words):
        per_model([str(two)], "SASRec")


def test_the_benchmark_compares_on_leave_one_out_with_twenty_candidates():
    assert benchmark_defaults()["eval_args"]["mode"] == {"valid": "uni20", "test": "uni20"}
    assert benchmark_defaults()["valid_metric"] == "NDCG@10"


@pytest.mark.parametrize("text", ["per_model: 5", "per_model: {SASRec: 5}", "per_model: [SASRec]"])
def test_a_malformed_per_model_section_is_one_line(tmp_path, text):
    from recbole_mllm.quick_start import make_config

    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match="bad.yaml:1: per_model must hold a model's name"):
        make_config("SASRec", "demo", [str(tmp_path / "bad.yaml")], {})
