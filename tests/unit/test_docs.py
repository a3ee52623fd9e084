"""What the docs show is real: commands are parsed, keys and presets known, Python compiles, links lead somewhere."""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import recbole_mllm
from recbole_mllm import api
from recbole_mllm.arguments import check_model, read_overrides
from recbole_mllm.benchmark import runner
from recbole_mllm.benchmark.jobs import BenchmarkPlan, jobs_of
from recbole_mllm.benchmark.variants import expand, resolve
from recbole_mllm.cli import main
from recbole_mllm.cli.main import COMMANDS, _read
from recbole_mllm.common.config import check_keys, check_values, config_paths, every_key
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.resources import converters

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_PROGRAM = re.compile(r"(.*/)?(recbole-mllm|run_recbole_mllm\.py)")


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every fenced block of `language`."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for found in _FENCE.finditer(text):
            if found[2] == language:
                yield f"{path.relative_to(ROOT)}:{text[: found.start()].count(chr(10)) + 1}", found[3]


def words_of(line: str) -> list[list[str]]:
    """Return the words of each call of our program in a shell line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    calls: list[list[str]] = []
    inside = False
    for word in lexer:
        if _PROGRAM.fullmatch(word):
            calls.append([])
            inside = True
        elif set(word) <= set("&|;"):
            inside = False
        elif inside:
            calls[-1].append(word)
    return calls


CALLS = [
    pytest.param(words, id=f"{where} {' '.join(words)[:50]}")
    for where, text in blocks("bash")
    for line in re.sub(r"\\\n\s*", " ", text).splitlines()
    for words in words_of(line)
]


def parse(words: list[str]) -> None:
    """Read `words` as the program does, as far as that needs no dataset.

    Raises:
        UserError: A command, an option, a key, a value, a preset or a model is not known.
    """
    assert not any("…" in word or "..." in word for word in words), "a command must be complete, to be copied"
    if words[:1] == ["convert"]:
        converters("options").convert_parser().parse_args(words[1:])
        return
    if words[:1] == ["split"]:
        known, rest = converters("options").read_split(words[1:])
        converters("options").split_settings(known)
        check_keys(read_overrides(rest), "the command line")
        return
    try:
        known, rest = _read([word for word in words if word != "--debug"])  # as `exit_code` leaves it out
    except SystemExit as end:  # --help, --version
        assert end.code == 0
        return
    name = " ".join(filter(None, (known.command, getattr(known, "action", None))))
    assert not name or name in COMMANDS
    keys = read_overrides(rest)
    assert not (keys and known.command in ("store", "export"))
    check_keys(keys, "the command line")
    check_values({key: value for key, value in keys.items() if not isinstance(value, str)}, lambda key: f"--{key}")
    # files that readers write themselves are not here; presets are, and so is what properties/ holds
    files = str(getattr(known, "config_files", None) or "").split()
    config_paths([name for name in files if not name.endswith(".yaml") or name.startswith("properties/")])
    models = known.models if name == "benchmark" else known.model if not name else ""
    for label in expand(models or ""):
        check_model(resolve(label).model)


@pytest.mark.parametrize("words", CALLS)
def test_every_command_in_the_docs_is_parsed(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse(words)


@pytest.mark.parametrize(
    "line",
    [
        "recbole-mllm sumarize --dataset demo",
        "recbole-mllm plan --dataset demo --devise H100",
        "recbole-mllm summarize --dataset demo --blok_size=3",
        "recbole-mllm summarize --dataset demo --block_size=0",
        "recbole-mllm benchmark --dataset demo --models quick,SASRek",
        "python run_recbole_mllm.py --model MLLMMSR --dataset demo --config_files qwen9",
        "recbole-mllm convert csv --raw log/ --interactions log.csv --items items.csv --outt dataset/mine",
        "a && recbole-mllm split demo --protocol temporally --out dataset/x",
    ],
)
def test_a_wrong_command_would_be_noticed(line):
    with pytest.raises(UserError):
        for words in words_of(line):
            parse(words)


def test_commands_were_found():
    assert len(CALLS) > 30
    assert ["summarize", "--dataset", "x"] in words_of("A=1 torchrun run_recbole_mllm.py summarize --dataset x # one")


def test_scripts_and_files_that_commands_name_are_there():
    for where, text in blocks("bash"):
        for path in re.findall(r"(?:^|[\s=\"])((?:benchmarks|tools|properties|examples|docs)/[\w./-]+)", text):
            assert (ROOT / path).exists(), f"{where}: {path}"


def test_python_in_the_docs_compiles_and_its_names_exist():
    found = list(blocks("python"))
    assert found
    for where, text in found:
        tree = ast.parse(text, where)
        names = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "recbole_mllm"
        }
        names |= {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "recbole_mllm"
            for alias in node.names
        }
        for name in names:
            assert name in recbole_mllm.__all__, f"{where}: recbole_mllm.{name}"


def test_yaml_in_the_docs_holds_known_keys():
    for where, text in blocks("yaml"):
        for key in yaml.safe_load(text):
            assert key in every_key() or key == "per_model", f"{where}: {key}"


def test_links_lead_somewhere():
    for path in PAGES:
        text = _FENCE.sub("", path.read_text(encoding="utf-8"))
        targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) + re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
        for target in targets:
            assert "://" in target or (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


def test_pages_that_messages_name_are_there():
    files = [
        path
        for folder in ("recbole_mllm", "dataset_converters", "properties", "benchmarks", "tools", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".html", ".md", ".ipynb")
    ]
    for path in [*files, ROOT / "CHANGELOG.md", *ROOT.glob("*.py")]:
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8")):
            assert (ROOT / page).is_file(), f"{path.relative_to(ROOT)}: {page}"


def test_each_page_begins_with_the_command_it_is_about():
    for path in (ROOT / "docs").glob("*.md"):
        assert re.match(r"# .+\n\n```(bash|python)\n", path.read_text(encoding="utf-8")), path.name


def test_messages_of_the_page_on_trouble_are_those_of_the_code():
    code = "\n".join(
        re.sub(r"\"\s*\n\s*f?\"", "", path.read_text(encoding="utf-8"))
        for folder in ("recbole_mllm", "dataset_converters")
        for path in (ROOT / folder).rglob("*.py")
    )
    tables = re.findall(
        r"^\| message .*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / "docs" / "trouble.md").read_text(), re.MULTILINE
    )
    messages = re.findall(r"^\| `(.+?)`", "".join(tables), re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        for words in re.split(r"\s*(?:…|'[^']*'|\b[A-Z]+\b:?)\s*", message):  # what stands for a name or a number
            assert len(words) < 6 or words in code, f"{message}: {words}"


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_keys_has_every_key_with_its_value_and_comment(hooks):
    for file in ("model/MLLMMSR.yaml", "overall.yaml"):
        page = hooks._table(file, "")
        for key, value in yaml.safe_load((ROOT / "properties" / file).read_text()).items():
            shown = re.search(rf"^\| `{key}` \| `(.*?)` \| .*\|$", page, re.MULTILINE)[1]
            assert yaml.safe_load(shown.replace("\\|", "|")) == value, key
    page = hooks.keys()
    assert re.search(r"^\| `block_size` \| `3` \| items a recurrent step reads", page, re.MULTILINE)
    assert re.search(r"^\| `train_neg_sample_args` .* \| negatives are drawn by \(seed, epoch\)", page, re.MULTILINE)


def test_the_reference_of_commands_has_every_command(hooks):
    page = hooks.commands()
    for name in (*COMMANDS, "convert csv"):
        assert f"## recbole-mllm {name}\n\n```text\nusage: recbole-mllm {name}" in page


@pytest.mark.parametrize(
    ("html", "is_refused"),
    [
        ('<script src="https://cdn.example/x.js">', True),
        ("<link rel=stylesheet href=//fonts.example/css>", True),
        ('<img alt="" src="http://example.org/a.png">', True),
        ('<a href="https://example.org">', False),
        ('<link rel="canonical" href="https://example.org/docs/">', False),
        ('<img src="../images/flow.svg"><script src="assets/x.js">', False),
    ],
)
def test_a_page_that_loads_from_outside_is_refused(hooks, html, is_refused):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="x.md"))
    if is_refused:
        with pytest.raises(Exception, match="loads from outside"):
            hooks.on_post_page(html, page)
    else:
        assert hooks.on_post_page(html, page) == html


# The figures of docs/scale.md follow from one another: exponents from times, the bill from its hours


SCALE = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
BILL = re.findall(
    r"^\| ([^|]+) \| [\d,]+ (?:prompts|rows|pairs), ([\d.]+) min \| (\d+) \| ([\d,]+) \|$", SCALE, re.MULTILINE
)


def test_exponents_are_those_of_the_times_they_stand_beside():
    timed = re.findall(r"^\| [\w ]+ \| ([\d.]+) s \| ([\d.]+) s \| ([\d.]+) s \| ([\d.]+) \|", SCALE, re.MULTILINE)
    later = re.findall(
        r"^\| [\w ]+ \| (\d+) s \| ([\d,]+) s \| [\d.]+ \| ([\d.]+) \| ([\d,]+) s \|$", SCALE, re.MULTILINE
    )
    assert len(timed) == len(later) == 3
    for (*times, exponent), (*two, between, foretold) in zip(timed, later, strict=True):
        power, level = np.polyfit(np.log([125, 250, 500]), np.log(np.array(times, float)), 1)
        assert power == pytest.approx(float(exponent), abs=0.006)
        assert np.exp(level + power * np.log(10_000)) == pytest.approx(float(foretold.replace(",", "")), abs=0.6)
        small, large = (float(text.replace(",", "")) for text in two)
        assert np.log10(large / small) == pytest.approx(float(between), abs=0.006)


def test_the_bill_is_its_hours_at_the_rate_it_names():
    assert len(BILL) == 5
    rate = float(re.search(r"([\d.]+) a device hour", SCALE)[1])
    for stage, minutes, hours, price in BILL:
        assert float(hours) == pytest.approx(float(minutes) / 60 * 1e6 / 2_000, rel=0.02), stage
        assert float(price.replace(",", "")) == pytest.approx(float(hours) * rate, abs=0.6 * rate), stage
    hours, price = re.search(r"^\| all \| [\d.]+ h \| (\d+) \| ([\d,]+) \|$", SCALE, re.MULTILINE).groups()
    assert float(hours) == pytest.approx(sum(float(row[2]) for row in BILL), abs=2)
    assert float(price.replace(",", "")) == pytest.approx(sum(float(row[3].replace(",", "")) for row in BILL), abs=3)


# The yardstick for GPUs runs, on a CPU and a tiny geometry


@pytest.mark.slow
def test_the_gpu_benchmark_ends_with_one_json_line():
    command = [sys.executable, "benchmarks/gpu.py", "--geometry", "tiny", "--users", "3", "--items", "1"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = json.loads(out.splitlines()[-1])
    for stage in ("scoring", "training"):
        assert found[stage]["largest"].keys() and found["matmul_tflops"] > 0
        for way in ("usual", "ours"):
            assert found[stage][way]["pairs_per_s"] > 0 and 0 < found[stage][way]["share_of_peak"] < 1.5


@pytest.mark.parametrize("page", ["demo", "ml-100k-loo", "ml-100k-temporal", "microlens-50k"])
def test_a_hub_model_in_the_table_of_a_page_finds_the_baselines_there(page, monkeypatch, tmp_path):
    plans: list[BenchmarkPlan] = []
    monkeypatch.setattr(runner, "benchmark", lambda plan, **_: plans.append(plan) or [])
    monkeypatch.setattr(api, "check_given", lambda *_: None)  # the datasets are not part of the repository
    monkeypatch.chdir(ROOT)
    calls = [words for where, text in blocks("bash") if page in where for words in words_of(text.replace("\\\n", " "))]
    for words in calls:
        if words[0] == "benchmark" and "--tune" not in words:
            with suppress(UserError):  # there is nothing to report
                main([*words, "--output_dir", str(tmp_path / "none")])
    jobs = (jobs_of(replace(plan, seeds=(2024,), labels=(*plan.labels, "SASRec"))) for plan in plans)
    ours, hubs = ({job.entry.label: job.run_id for job in found} for found in jobs)
    assert ours["SASRec"] == hubs["SASRec"] and ours["MLLMMSR"] != hubs["MLLMMSR"]
    assert ours["MLLMMSR+SASRec"] != hubs["MLLMMSR+SASRec"]
