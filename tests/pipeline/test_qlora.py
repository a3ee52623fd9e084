"""QLoRA for real, on the CPU: trained in four bits through the command line, resumed, exported, and served alike."""

import json
from dataclasses import replace

import pytest
import small_world
import tiny_models
import torch
from recbole.quick_start import load_data_and_model
from stock_forward import SETTINGS, STYLE, loss_of, own_inputs, own_logits
from torch.nn import functional
from transformers import AutoModelForImageTextToText

from recbole_mllm.cli import main
from recbole_mllm.common.checkpoint import read_checkpoint
from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.lora import tune

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `qlora`)")
CPU = torch.device("cpu")
KEYS = {
    "mllm": "tiny", "finetune": "qlora", "summary_mode": "none", "item_summary": "none", "learning_rate": 0.02,
    "train_last_k": 1, "limit_users": 6, "train_batch_size": 8, "lora_dropout": 0.1, "show_progress": False, "seed": 3,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni5"},
}  # fmt: skip


def run(place, **more):
    words = [f"--{key}={json.dumps(value, separators=(',', ':'))}" for key, value in (KEYS | more).items()]
    assert main(["--model", "MLLMMSR", "--dataset", "steps", f"--data_path={place / 'data'}", *words]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and two runs of two epochs: one straight, one stopped after the first and resumed."""
    place = tmp_path_factory.mktemp("qlora")
    small_world.write(place / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, epochs in (("straight", 2), ("resumed", 1), ("resumed", 2)):
            course = {"epochs": epochs, "lr_scheduler": "constant", "warmup_ratio": 0.0, "stopping_step": 10}
            course |= {"gradient_checkpointing": True, "checkpoint_every_steps": 1, "checkpoint_dir": str(place / name)}
            found = [str(path) for path in (place / name).glob("*.last.pth")]
            run(place, **course | ({"resume": found[0]} if found else {}))
    return place


def checkpoint(place, name):
    (path,) = (p for p in (place / name).glob("MLLMMSR-*.pth") if not p.name.endswith(".last.pth"))
    return path


@pytest.fixture(scope="module")
def local(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        path = checkpoint(place, "straight")
        _, model, *_ = load_data_and_model(str(path))
    model.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    return model.eval()


def test_the_base_is_in_four_bits_and_the_adapter_alone_is_kept(place, local):
    layers = [m for m in local.backbone.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert layers and all(layer.weight.dtype == torch.uint8 for layer in layers)
    assert all(layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested for layer in layers)
    state = read_checkpoint(checkpoint(place, "straight"), CPU)["state_dict"]
    assert state and all("lora_" in name and tensor.dtype == torch.float32 for name, tensor in state.items())
    assert any(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)


def test_a_resumed_run_ends_as_a_straight_one_bit_for_bit(place):
    one, other = (read_checkpoint(next((place / name).glob("*.last.pth")), CPU) for name in ("straight", "resumed"))
    assert one["training"]["place"] == other["training"]["place"]
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(tensor, other["state_dict"][name]) for name, tensor in one["state_dict"].items())


def test_a_merged_export_scores_as_the_run_did(place, local, tmp_path):
    out = tmp_path / "merged"
    assert main(["export", str(checkpoint(place, "straight")), "--out", str(out), "--merge"]) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert "four bits" in (out / "README.md").read_text()
    stock = AutoModelForImageTextToText.from_pretrained(out).eval()
    images = sorted((place / "data" / "steps" / "images").iterdir())
    encoder = local.mllm.encoder
    prompts = [recommend_prompt(local.style, "The user likes red.", f"mug {n}", images[n]) for n in range(4)]
    own = torch.stack([own_logits(stock, own_inputs(encoder.tokenizer, encoder.processor, p))[-1] for p in prompts])
    served = own[:, local.answers.yes[0]] - own[:, local.answers.no[0]]
    assert torch.allclose(local.mllm.yes_scores(prompts, local.answers), served, atol=1e-4)


def test_an_adapter_export_says_that_its_base_was_in_four_bits(place, tmp_path):
    out = tmp_path / "adapter"
    assert main(["export", str(checkpoint(place, "straight")), "--out", str(out)]) == 0
    assert (out / "adapter_config.json").is_file() and "NF4" in (out / "README.md").read_text()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_gradients_are_those_of_the_weights_the_bits_stand_for_before_and_after_scoring(tmp_path, checkpointing):
    folder = tiny_models.llama(tmp_path / "llama")
    four = HFModel(str(folder), SETTINGS.mllm, CPU, four_bit=True)
    whole = HFModel(str(folder), SETTINGS.mllm, CPU, four_bit=True)
    whole.replace_model(whole.model.dequantize())
    for mllm in (four, whole):
        mllm.replace_model(tune(mllm.model, replace(SETTINGS.lora, lora_dropout=0.0), seed=1))
    if checkpointing:
        four.checkpoint_gradients()
    answers = four.answers(STYLE)
    prompts = [recommend_prompt(STYLE, f"likes {word}", "a red mug", None) for word in ("cats", "dogs and hens", "red")]
    labels = torch.tensor([1.0, 0.0, 1.0])
    for _ in range(2):  # the second time behind an evaluation
        found = []
        for mllm in (four, whole):
            mllm.model.train()
            mllm.model.zero_grad()
            loss_of(mllm, prompts, labels).backward()
            found.append(torch.cat([p.grad.flatten() for p in mllm.model.parameters() if p.grad is not None]))
            mllm.model.eval()
        assert functional.cosine_similarity(*found, dim=0) > 1 - 1e-6
        assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()
        scores = [mllm.yes_scores(prompts, answers) for mllm in (four, whole)]
        assert torch.allclose(*scores, atol=1e-5)
