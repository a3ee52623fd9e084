"""The command line: a mistake is one line and exit code 2; what is right is passed on as it was meant."""

import sys

import pytest

from recbole_mllm import benchmark_commands, commands
from recbole_mllm.cli import main
from recbole_mllm.errors import UserError
from recbole_mllm.options import Options


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder in which the demo's dataset is built once, for all tests."""
    return tmp_path_factory.mktemp("dataset")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, datasets):
    (tmp_path / "dataset").symlink_to(datasets)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recbole-mllm"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("benchmark --dataset demo", "--models"),
        ("benchmark --models Pop", "--dataset is missing"),
        ("benchmark --dataset demo --models MLLMMSR:drect", "did you mean MLLMMSR:direct"),
        ("benchmark --dataset demo --models Pop --seeds x", "--seeds 'x' must be whole numbers"),
        ("--dataset demo", "add --model MLLMMSR"),
        ("--model SASRec --dataset demo --epohcs=3", "unknown key 'epohcs' in the command line; did you mean 'epochs'"),
        ("--model SASRec --dataset demo epochs=3", "invalid choice: 'epochs=3'"),
        ("--model SASRec --dataset demo --config_files none.yaml", "'none.yaml' does not exist and is no preset"),
        ("--model Nope --dataset demo", "[Nope] is not the name of an existing model"),
        ("--model SASRec --dataset absent", "no dataset 'absent'"),
        ("--model MLLMMSR --dataset demo --lora_r=x", "lora_r is 'x'; it must be int"),
        ("--model SASRec --dataset demo --limit_users many", "invalid int value"),
        ("--model SASRec --dataset demo --epochs=many", "epochs: 'many' must be a whole number, at least 0"),
        ("--model SASRec --dataset demo --learner=adm", "learner: adm is not known; take one of adam, adamw"),
        ("--model SASRec --dataset demo --valid_metric=MRR@7", "MRR@7 is not measured (metrics: "),
        ("--model SASRec --dataset demo --metrics=[Recal]", "configuration: There is no metric named 'Recal'"),
        ("--model BPR --dataset demo --eval_args={'mode':'unix'}", "eval_args.mode must be full, or uniN or popN"),
        ("--model BPR --dataset demo --eval_args={'mod':'uni20'}", "'mod' in eval_args; did you mean 'mode'?"),
        ("report nowhere", "holds no runs.jsonl"),
        ("conver", "invalid choice"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_benchmark_of_which_nothing_finishes_exits_with_1(capsys):
    words = ["--dataset", "demo", "--models", "Pop", "--valid_metric=MRR@7", "--output_dir", "out"]
    assert main(["benchmark", *words]) == 1
    told = capsys.readouterr().out
    assert "No run has finished" in told and "MRR@7 is not measured" in told


def test_debug_shows_where_it_came_from():
    with pytest.raises(UserError):
        main(["--dataset", "demo", "--debug"])


def test_options_may_stand_before_or_behind_the_command(monkeypatch):
    calls = []
    monkeypatch.setattr(benchmark_commands, "benchmark", lambda *given: calls.append(given) or 0)
    for words in (
        "--seed 3 --limit_users 5 benchmark --dataset d --models A,B --lora_r=4 --topk=[1,5]",
        "benchmark --dataset d --models A,B --lora_r=4 --seed 3 --topk=[1,5] --limit_users 5",
        "benchmark --dataset=d --models=A,B --lora_r=4 --seed=3 --topk=[1,5] --limit_users=5",
    ):
        assert main(words.split()) == 0
    options = Options({"lora_r": 4, "topk": [1, 5], "limit_users": 5}, (), 3)
    assert calls == [("d", "A,B", None, None, 1, False, options, 0)] * 3


@pytest.mark.parametrize(("words", "quick"), [("--quick", True), ("", False)])
def test_a_quick_look_is_asked_for(monkeypatch, words, quick):
    calls = []
    monkeypatch.setattr(benchmark_commands, "benchmark", lambda *given: calls.append(given) or 0)
    assert main(f"benchmark --dataset d --models A {words}".split()) == 0
    assert calls[0][6].quick is quick


def test_config_files_are_separated_by_spaces(monkeypatch):
    calls = []
    monkeypatch.setattr(commands, "run_model", lambda *given: calls.append(given) or 0)
    main(["--model", "SASRec", "--dataset", "d", "--config_files", "a.yaml demo"])
    assert calls[0][2].config_files == ("a.yaml", "demo")


def test_no_argument_is_the_demo_and_a_seed_is_another_world(monkeypatch):
    worlds = []
    monkeypatch.setattr(benchmark_commands, "benchmark", lambda dataset, *rest: worlds.append((dataset, rest[2])) or 0)
    assert main([]) == main(["--seed", "7"]) == 0
    assert worlds == [("demo", "results/demo"), ("demo-7", "results/demo")]


@pytest.mark.parametrize(("words", "embed"), [([], True), (["--embed_images", "off"], False)])
def test_images_are_embedded_unless_told_otherwise(monkeypatch, words, embed):
    told = []
    monkeypatch.setattr(benchmark_commands, "report", lambda folder, images: told.append(images) or 0)
    monkeypatch.setattr(benchmark_commands, "benchmark", lambda *given: told.append(given[6].embed_images) or 0)
    main(["report", "results/demo", *words])
    main(["benchmark", "--dataset", "demo", "--models", "Pop", *words])
    assert told == [embed, embed]
    assert main(["report", "results/demo", "--embed_images", "maybe"]) == 2


def test_results_of_another_world_are_set_aside_not_lost(tmp_path, monkeypatch):
    from recbole_mllm.benchmark.records import RunRecord, append

    monkeypatch.setattr(benchmark_commands, "benchmark", lambda *given: 0)
    record = RunRecord(
        run_id="Pop-1", model="Pop", label="Pop", kind="baseline", seed=1, dataset="demo", status="x", started=""
    )
    append(tmp_path / "results" / "demo" / "runs.jsonl", record)
    main(["--seed", "7"])
    assert (tmp_path / "results" / "demo.1" / "runs.jsonl").is_file()


def test_progress_is_plain_lines_off_a_terminal(caplog, monkeypatch):
    from recbole_mllm import progress

    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with progress.Progress(10, "scoring", "pair") as shown:
        shown.update(4)
    assert "scoring: 4 of 10" in caplog.text and "left" in caplog.text


def test_a_setting_may_hold_spaces(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "MLLMMSR", "--dataset", "demo", "--mllm=a folder/with spaces"]
    assert main(words) == 2
    assert "a folder/with spaces" in capsys.readouterr().err
