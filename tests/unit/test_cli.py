"""The command line: a mistake is one line and exit code 2; what is right is passed on as it was meant."""

import argparse
import os
import shlex
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import small_world
import torch
from planned_server import Handler, listening
from planted_runs import plant_run
from safetensors import SafetensorError

from recbole_mllm.arguments import Options, config_of, read_overrides
from recbole_mllm.benchmark import runner, worker
from recbole_mllm.benchmark.records import RECORDS, append
from recbole_mllm.cli import commands, doctor, main
from recbole_mllm.common.resources import TRANSFORMERS

command_line = sys.modules["recbole_mllm.cli.main"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder with a small dataset in the demo's place, which takes longer to build."""
    folder = tmp_path_factory.mktemp("dataset")
    small_world.write(folder, "demo", images=False)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, datasets):
    (tmp_path / "dataset").symlink_to(datasets)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("benchmark --dataset demo", "--models"),
        ("benchmark --models Pop", "--dataset is missing"),
        ("benchmark --dataset demo --models Pop --seeds x", "--seeds 'x' must be whole numbers"),
        ("--dataset demo", "add --model MLLMMSR"),
        ("--model SASRec --dataset demo --epohcs=3", "unknown key 'epohcs' in the command line; did you mean epochs"),
        ("--model SASRec --dataset demo epochs=3", "command 'epochs=3' is unknown"),
        ("benchmrk --dataset demo", "did you mean benchmark?"),
        ("convert csv --raw a --out b --interaction c.csv", "--interaction c.csv; did you mean --interactions?"),
        ("--model SASRec --dataset demo --config_files none.yaml", "'none.yaml' does not exist and is no preset"),
        ("--model SASRec --dataset demo --valid_metric=MRR@7", "MRR@7 is not measured (metrics: "),
        ("--model BPR --dataset demo --eval_args={'mod':'uni20'}", "'mod' in eval_args; did you mean mode?"),
        ("--model BPR --dataset demo --eval_args={'mode':'labeled'}", "has no candidates to freeze"),
        ("--model BPR --dataset demo --device=cuda:99", "device is 'cuda:99'; it must be cpu here: torch sees"),
        ("--model BPR --dataset demo --note=2026-02-30", "cannot read the value of --note"),
        ("--model MLLMMSR --dataset demo --prompt_style=nix", "prompt_style 'nix' is unknown; give a YAML file or one"),
        ("--model MLLMMSR --dataset demo --image_dir nix", "image_dir 'nix' does not exist"),
        ("--model SASRek --dataset demo", "[SASRek] is not the name of an existing model; did you mean SASRec?"),
        ("--model MLLMMSR:direct --dataset demo", "variants and sets of models are for `benchmark"),
        ("--model saved/x.pth --dataset demo", "[saved/x.pth] is a path where a model's name is wanted"),
        ("--model Pop --dataset dataset/demo/", "not a path; for that folder write --dataset demo"),
        ("--model Pop --dataset dmeo", "no dataset 'dmeo' in dataset (did you mean demo?)"),
        ("--model Pop --dataset demo --config_files dataset", "config file 'dataset' is a folder"),
        ("benchmark --dataset demo --models Pop --seeds=-1", "--seeds is -1; it must be a whole number, at least 0"),
        ("benchmark --dataset demo --models Pop,SASRec --topk=[5]", "NDCG@10 is not measured (metrics: "),
        ("plan --dataset demo --nodes 0", "--nodes is 0; it must be a whole number, at least 1"),
        ("report nowhere", "holds no runs.jsonl"),
        ("--modle SASRec --dataset demo", "there is no option '--modle'; did you mean --model?"),
        ("report nowhere --embed_image=off", "report takes no '--embed_image=off'; did you mean --embed_images?"),
        ("inspect demo --limit 3", "inspect takes no '--limit'; see --help"),
        ("store show demo --item 1 --promt", "store show takes no '--promt'; did you mean --prompt?"),
        ("benchmark --dataset demo --models Pop --limit 3", "cannot read '--limit'; keys are written --key=value"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not Path("results").exists(), "nothing has begun"


def test_a_benchmark_of_which_a_run_fails_exits_with_1_and_names_it(monkeypatch, capsys):
    def work(self, job, lock, head):
        status = "ok" if job.entry.model == "Pop" else "too few candidates"
        append(
            self.records,
            record := plant_run(job.plan.output_dir, job.entry.model, 0.0, run_id=job.run_id, status=status),
        )
        return record

    monkeypatch.setattr(runner._Bench, "_work", work)
    monkeypatch.setattr(worker, "digests_of", lambda *args, **more: {})
    words = ["benchmark", "--dataset", "demo", "--output_dir", "out", "--models"]
    assert main([*words, "BPR"]) == 1 and "No run has finished" in capsys.readouterr().out
    assert main([*words, "BPR,Pop"]) == 1
    told = capsys.readouterr()
    assert "too few candidates" in told.out and told.err.count("\n") == 1 and "failed: BPR seed 2024; " in told.err
    assert main([*words, "Pop"]) == 0 and not capsys.readouterr().err  # the row that failed was not asked for


def test_a_value_in_a_file_is_named_with_its_line(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("seed: 7\nper_model:\n  MLLMMSR:\n    lora_alpha: 0\n")
    words = ["--dataset", "demo", "--config_files", "mine.yaml"]
    assert main(["--model", "MLLMMSR", *words]) == 2
    said = "lora_alpha is 0; it must be a whole number, at least 1 (mine.yaml:4)"
    assert capsys.readouterr().err == f"recbole-mllm: {said}\n"
    (tmp_path / "mine.yaml").write_bytes("note: Übung\n".encode("latin-1"))
    assert main(["--model", "Pop", *words]) == 2
    assert "mine.yaml:1: it is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device"), 2, "could not be written: No space left on device"),
        (PermissionError(13, "Permission denied", "results/x"), 2, "results/x: Permission denied"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), 2, "a -> b: Invalid cross-device link"),
        (ConnectionResetError(104, "Connection reset by peer"), 1, "Connection reset by peer"),
        (MemoryError(), 1, "memory ran out; smaller batches"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 1, "ran out (CUDA out of memory)"),
        (
            SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
            2,
            "weights could not be written: Error while serializing: I/O error: File too large",
        ),
        (KeyboardInterrupt(), 1, "stopped; finished work is saved"),
        (BrokenPipeError(32, "Broken pipe"), 1, None),
    ],
)
def test_what_the_machine_refuses_is_one_line(monkeypatch, capsys, error, code, said):
    def run(*given):
        raise error

    monkeypatch.setattr(commands, "run_model", run)
    assert main(["--model", "Pop", "--dataset", "demo"]) == code
    told = capsys.readouterr().err
    assert told == "" if said is None else (said in told and told.count("\n") == 1)
    with pytest.raises(type(error)) if code == 2 else nullcontext():  # --debug shows where
        main(["--model", "Pop", "--dataset", "demo", *(["--debug"] if code == 2 else [])])


@pytest.mark.parametrize(("words", "said"), [("export  --out out", "it got ''"), ("export x --out ~/o", "in full")])
def test_a_path_that_is_empty_or_that_no_shell_has_expanded_is_a_line(words, said, tmp_path, capsys):
    assert main(words.split(" ")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told and [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(commands, "run_model", lambda *given: {}["x"])
    with pytest.raises(KeyError):
        main(["--model", "Pop", "--dataset", "demo"])


PRINTS = """
import sys
from recbole_mllm.common import console
sys.exit(console.exit_code(lambda words: [print("Für Elise \\u2192 \\udcff" * 5000) for _ in range(9)] and 0, []))
"""


FULL = "recbole-mllm: a file, or the standard output, could not be written: No space left on device\n"


@pytest.mark.parametrize(
    ("place", "code", "said"),
    [("> /dev/full", 2, FULL), (">&- 2>&-", 0, ""), ("| head -c 9 > /dev/null; exit ${PIPESTATUS[0]}", 1, "")],
)
def test_a_standard_output_that_takes_no_more_is_no_traceback(place, code, said):
    done = subprocess.run(
        ["bash", "-c", f'"$@" {place}', "bash", sys.executable, "-c", PRINTS], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, said)


def test_a_stream_that_is_closed_leaves_its_number_to_no_file(tmp_path):
    code = """
import os, sys
from recbole_mllm.common import console
def run(words):
    with open(sys.argv[1], "w") as file:
        print("not for the file"), os.system("echo nor this")
        return file.fileno() < 3
sys.exit(console.exit_code(run, []))
"""
    words = ["bash", "-c", '"$@" >&- 2>&-', "bash", sys.executable, "-c", code, tmp_path / "store"]
    assert subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
    assert (tmp_path / "store").read_text() == ""


def test_a_gpu_that_is_not_there_is_a_line_in_the_log(caplog):
    from recbole_mllm.common.config import tell_missing_gpus

    config = config_of("Pop", "demo", Options({"gpu_id": 4099}))
    tell_missing_gpus(config)
    tell_missing_gpus(config)
    assert caplog.text.count("gpu_id 4099: torch sees 0 such GPUs here, so this run is on cpu") == 1
    caplog.clear()
    tell_missing_gpus(config_of("Pop", "demo", Options()))
    tell_missing_gpus(config_of("Pop", "demo", Options({"gpu_id": 7, "device": "cpu"})))
    assert caplog.text == ""


def test_options_may_stand_before_or_behind_the_command(monkeypatch):
    calls = []
    monkeypatch.setattr(commands, "_benchmark", lambda *given, **more: calls.append((given, more)) or 0)
    for words in (
        "--seed 3 --limit_users 5 --config_files 'a demo' benchmark --dataset d --models A,B '--mllm=a b' --topk=[1,5]",
        "benchmark --dataset=d --models A,B '--mllm=a b' --seed=3 --topk=[1,5] --limit_users=5 '--config_files=a demo'",
    ):
        assert main(shlex.split(words)) == 0
    options = Options({"mllm": "a b", "topk": [1, 5], "limit_users": 5}, ("a", "demo"), 3)
    more = {"seeds": None, "jobs": 1, "force": False, "tune": 0, "quick": False, "embed_images": True}
    assert calls == [(("d", "A,B", Path("results/d"), options), more)] * 2
    words = "benchmark --dataset d --models A --quick --embed_images off --seeds 1,2 --force"
    assert main(words.split()) == 0
    more = calls[-1][1]
    assert more["seeds"] == (1, 2) and more["quick"] and more["force"] and not more["embed_images"]
    assert main(["benchmark", "--dataset", "d", "--models", "A", "--embed_images", "maybe"]) == 2


def test_no_argument_is_the_demo_and_a_seed_is_another_world(monkeypatch):
    worlds = []
    monkeypatch.setattr(commands, "_benchmark", lambda *given, **more: worlds.append(given[:3]) or 0)
    assert main([]) == main(["--seed", "7"]) == 0
    assert worlds == [("demo", "quick", Path("results/demo")), ("demo-7", "quick", Path("results/demo"))]


def test_results_of_another_world_are_set_aside_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "_benchmark", lambda *given, **more: 0)
    results = tmp_path / "results" / "demo"
    append(results / RECORDS, plant_run(results, "Pop", 0.0))
    main(["--seed", "7"])
    assert (tmp_path / "results" / "demo.1" / "runs.jsonl").is_file()


def test_progress_is_plain_lines_off_a_terminal(caplog, monkeypatch):
    from recbole_mllm.common import progress

    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with progress.Progress(10, "scoring", "pair") as shown:
        shown.update(4)
    assert "scoring: 4 of 10" in caplog.text and "left" in caplog.text


def test_help_starts_at_once_and_loads_nothing_heavy():
    code = "import sys; from recbole_mllm.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'pandas', 'recbole', 'transformers', 'jinja2'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.partition("positional arguments:")[2]
    for command in ("convert", "summarize", "plan", "benchmark", "inspect", "report", "rerun", "export", "store"):
        assert f"\n    {command} " in shown


# Help, completion, doctor


def test_every_example_of_a_help_is_read_and_every_default_is_said(capsys):
    from recbole_mllm.common.resources import converters

    top, _ = command_line._parser()
    parsers = [top, converters("options").convert_parser(), converters("options").split_parser()]
    for parser in parsers:
        subs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        parsers += [one for action in subs for one in action.choices.values()]
    examples = {line for p in parsers for line in p.format_help().splitlines() if line.startswith("  recbole-mllm ")}
    assert len(examples) > 25
    for program, *words in map(shlex.split, examples):
        assert program == "recbole-mllm"
        if words[:1] == ["split"]:
            assert converters("options").read_split(words[1:])[1] == []
        elif words[0] == "convert" and "--help" not in words:
            assert converters("options").convert_parser().parse_args(words[1:])
        elif "--help" not in words:
            read_overrides(command_line._read(words)[1])
    for parser in parsers[3:]:
        ends = any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
        assert ends or parser.prog.endswith((" convert", " split")) or "examples:" in parser.format_help(), parser.prog
        for action in parser._actions:
            stated = type(action.default) in (int, str) and action.default != argparse.SUPPRESS
            if stated and action.option_strings and action.help != argparse.SUPPRESS:
                assert "default" in " ".join(parser.format_help().split()), (parser.prog, action.dest)


def test_completion_is_a_script_of_the_shell_or_a_hint(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    for word in ("benchmark", "--prompt", "--k-core", "--boundaries"):
        assert word in script
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "zsh"]) == 2
    assert 'pip install "recbole-mllm[cli]"' in capsys.readouterr().err


def test_raw_files_in_a_folder_of_the_datasets_name_are_not_taken_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_world.write(tmp_path / "dataset", images=False)
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "ratings.dat").touch()
    assert main(["split", "steps", "--protocol", "loo", "--out", "dataset/other"]) == 0
    assert main(["inspect", "steps"]) == 0 and (tmp_path / "dataset" / "steps" / "inspect.html").is_file()


def test_a_hub_that_refuses_is_one_that_answers(monkeypatch):
    class Refusing(Handler):
        def do_HEAD(self):
            self.send_error(403)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with listening(Refusing) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert doctor._hub() == f"{url} answers (403)"


def test_doctor_says_what_is_here_and_what_is_not(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"all {len(doctor.PATCHES)} changes to it are in place" in said and "HF_HUB_OFFLINE is set" in said
    heads = [line.split("  ")[0] for line in said.splitlines()]
    assert heads[:4] == ["python", "libraries", "optional", "recbole"] and "slow here" in heads and "data" in heads
    broken = doctor.PATCHES[0]._replace(module="recbole.nowhere")
    monkeypatch.setattr(doctor, "PATCHES", (*doctor.PATCHES, broken))
    assert main(["doctor"]) == 1
    assert "1 of its modules cannot be loaded and changed, the first recbole.nowhere" in capsys.readouterr().out
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("recbole", "peft") else known(name))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "not installed: pip install recbole==1.2.1" in said and "peft missing: pip install peft" in said
    monkeypatch.setattr(doctor, "_version", lambda name: "5.17.1" if name == "transformers" else known(name))
    assert main(["doctor"]) == 1
    assert f"transformers 5.17.1 is too old: pip install 'transformers>={TRANSFORMERS}'" in capsys.readouterr().out
    assert f'"transformers>={TRANSFORMERS}"' in (ROOT / "setup.py").read_text()
    assert main(["doctor", "--epochs=3"]) == 2


def test_doctor_waits_for_no_hub_that_is_silent(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(doctor, "_HUB_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "use a local folder" in doctor._hub()
        assert time.monotonic() - started < 5


def test_a_run_leaves_all_its_files_below_one_folder(tmp_path):
    command = [sys.executable, str(ROOT / "run_recbole_mllm.py"), "--model", "Pop", "--dataset", "demo"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "saved"]
    (log,) = (tmp_path / "saved" / "log" / "Pop").iterdir()
    assert "Loading model structure" in log.read_text() and "\x1b[" not in log.read_text()
    assert [path.name for path in (tmp_path / "saved" / "log_tensorboard").iterdir()] == [log.stem]
