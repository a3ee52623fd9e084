"""Settings: every shipped file parses, a wrong value or unknown key is one line that helps."""

import pytest
import yaml

from recbole_mllm.config import benchmark_defaults, config_paths, per_model
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
