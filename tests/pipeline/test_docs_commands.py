"""Every command of the docs runs, page after page, in a copy of the checkout; tables say what stands in for what."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_models
from hub_cache import HubCache
from hub_double import TOKEN, Hub, serving_hub
from huggingface_hub import constants
from launching import FSDP
from planned_server import listening
from raw_dumps import jsonl, product, review, write_microlens

from recbole_mllm.cli import main
from recbole_mllm.common.resources import named, resource
from recbole_mllm.common.yaml_files import read_mapping
from recbole_mllm.demo.render import render
from recbole_mllm.demo.world import demo_world, item_id, user_id
from tests.unit.test_docs import ROOT, blocks, words_of

# ---- what is not run, and why
SKIPPED = {
    r"-m pytest|^bash \.ci/run|^lint-imports": "the suite, and what .ci/run does around it",
    r"\bpip install [^&]*$": "needs a network; .ci/run makes a new environment",
    r"^hf auth login": "asks a person; HF_TOKEN is set instead",
    r"^python benchmarks/(dataload|scoring|scale)\.py": "minutes, which is what they measure",
    r"^python tools/measure_tiny_mllm\.py": "half an hour",
}
# ---- what is run in another form: pattern, stand-in, why; in this order
_TORCHRUN = "torchrun --standalone --local-addr 127.0.0.1 --nproc_per_node 2"
_SPLIT = " ".join(f"{name}={value}" for name, value in FSDP.items())
_SHORT = "--item_summary_tokens=8 --user_summary_tokens=8 --train_last_k=1"
_VLLM = """python -c 'import sys, time; from planned_server import Planned, serving
from tests.unit.test_server_scoring import Reranker
model, folder = sys.argv[1:]
posts = {"/v1/rerank": Reranker(folder, False)} if "Reranker" in model else {}
with serving(Planned(posts=posts, models=[model]), {port}):
    time.sleep(3600)' \\1 $HF_HUB_CACHE/models--$(echo \\1 | sed s,/,--,)/snapshots/*"""
STAND_INS = [
    (r"python3\.11 -m venv .*?&& \S+pip install \S.*? -e \S+ && ", "", "no network; .ci/run makes a new environment"),
    (r"\.venv/bin/python", "python", "the same"),
    (r'eval "\$\((.*?)\)"', r"\1 | bash", "bash hides a failure inside $( )"),
    (r"vllm serve (\S+) .*", _VLLM, "a GPU's; capitals for summaries, a tiny reranker's scores"),
    (r"transformers serve .*", r"\g<0> --device cpu", "no GPU"),
    (r"--port 8000", "--port {port}", "8000 may be taken"),
    (r"localhost:8000", "localhost:{port}", "the same"),
    (r"(?=recbole-mllm .*--push-to-hub)",
     f"HF_ENDPOINT={{hub}} HF_HUB_OFFLINE=0 HF_HUB_DISABLE_XET=1 HF_TOKEN={TOKEN} ", "tests/hub_double.py"),
    (r"--device_map=auto --gpu_id=0,1", "--device_map=auto", "no GPU"),
    (r"accelerate launch --config_file properties/accelerate/fsdp\.yaml",
     f"ACCELERATE_USE_CPU=true {_SPLIT} {_TORCHRUN}", "no GPU, where accelerate starts one process"),
    (r"accelerate launch --num_processes 4", f"ACCELERATE_USE_CPU=true {_TORCHRUN}", "the same"),
    (r"torchrun --nproc_per_node \d", _TORCHRUN, "two cores; names that may not resolve"),
    (r"benchmarks/gpu\.py", r"\g<0> --users 3 --items 1", "minutes"),
    (r"benchmarks/ranker\.py --full", r"benchmarks/ranker.py --worlds 7 --limit_users 4 --out .", "days"),
    (r"tools/train_tiny_mllm\.py", r"\g<0> --smoke --work made --out made/tiny", "45 minutes"),
    (r"\bquick\b", "Pop,MLLMMSR", "fewer models; test_docs.py expands the sets"),
    (r"Random,Pop,ItemKNN,BPR,GRU4Rec,SASRec", "Pop", "the same"),
    (r"\bbaselines,features\b", "ItemKNN,SASRecF:image", "the same"),
    (r"\bablations\b", "MLLMMSR:block-2", "the same"),
    (r"(?<!-)\bcontrols\b", "MLLMMSR:title-only", "the same"),
    (r"2024,2025,2026", "2024,2025", "fewer seeds"),
    (r"(recbole-mllm|run_recbole_mllm\.py)( benchmark|(?= --model| --seed|$))",
     rf"\g<0> --limit_users 4 --epochs=1 {_SHORT}", "minutes"),
    (r"(recbole-mllm|run_recbole_mllm\.py) summarize", rf"\g<0> {_SHORT}", "the same"),
]  # fmt: skip
PLAIN = re.compile(r"(recbole-mllm|python run_recbole_mllm\.py)(?! --help)( [^|&;<>$()]*)?")
SERVER = re.compile(r"(vllm|transformers) serve ")
FILES = {  # an option, and what is there afterwards of its value
    "--out": "{}", "--json": "{}", "--output_dir": "{}/leaderboard.html",
    "inspect": "dataset/{}/inspect.html", "report": "{}/leaderboard.html",
}  # fmt: skip

BLOCKS = [
    (where, [line for line in re.sub(r"\\\n\s*|\s+#.*", " ", text).splitlines() if line.strip()])
    for where, text in blocks("bash")
]
COMMANDS = [
    pytest.param(where, number, id=f"{where}+{number + 1} {line[:60]}", marks=pytest.mark.slow)
    for where, lines in BLOCKS
    for number, line in enumerate(lines)
]


def skipped(line: str) -> str | None:
    return next((reason for pattern, reason in SKIPPED.items() if re.search(pattern, line)), None)


def stand_in(line: str, **names: object) -> str:
    for pattern, other, _ in STAND_INS:
        line = re.sub(pattern, other, line)
    for name, value in names.items():
        line = line.replace(f"{{{name}}}", str(value))
    return line


def test_every_rule_is_of_some_command():
    lines = [line for _, found in BLOCKS for line in found]
    assert not [pattern for pattern in SKIPPED if not any(re.search(pattern, line) for line in lines)]
    lines = [line for line in lines if not skipped(line)]
    for pattern, other, _ in STAND_INS:
        assert any(re.search(pattern, line) for line in lines), pattern
        lines = [re.sub(pattern, other, line) for line in lines]


# ---- the world of a reader who follows the docs: 24 users, 40 items, each user goes ten items further
STEP, BEGIN = 3 * 3600, int(datetime(2026, 10, 10, tzinfo=UTC).timestamp())
NUMBERS = range(40)
ROWS = [(user, (5 * user + t) % 40, BEGIN + (24 * t + user) * STEP) for t in range(10) for user in range(24)]


def shown(number: int) -> str:
    """Return an item's id; the docs name two of the demo's."""
    return {0: "i0335", 1: "i0261"}.get(number, item_id(number))


class Reader:
    """A checkout, a hub's cache, raw files, datasets, and a first run on two of them."""

    def __init__(self, home: Path, hub: Hub, shop: str) -> None:
        self.home, self.hub = home, hub
        self.done: set[tuple[str, int]] = set()
        self.servers: list[subprocess.Popen[bytes]] = []
        self.code, self.base = home / "checkout", home / "base"
        kept = {"run_recbole_mllm.py", "pyproject.toml", "recbole_mllm", "dataset_converters", "properties"}
        kept |= {"docs", "benchmarks", "tools", "tests"}  # a copy: what a command overwrites is not the reader's own
        shutil.copytree(ROOT, self.code, ignore=lambda at, names: [] if at != str(ROOT) else {*names} - kept)
        self.base.mkdir()
        self._models()
        self._datasets(shop)
        for line in (
            "recbole-mllm convert csv --raw log/ --interactions log.csv --items items.csv --out dataset/mine",
            "recbole-mllm convert amazon2023 --raw Video_Games/ --out dataset/games --download-images",
            "recbole-mllm convert movielens --raw ml-1m/ --out dataset/ml-1m",
            "recbole-mllm summarize --dataset demo",
            "recbole-mllm benchmark --dataset demo --models quick,MLLMMSR+SASRec",
            # not Qwen-VL, whose video processor transformers serve loads, which needs torchvision
            "recbole-mllm benchmark --dataset mine --models MLLMMSR --config_files llava-1.6-mistral-7b",
        ):
            self.run(stand_in(line), self.base)

    def _models(self) -> None:
        families = {"smolvlm": "smolvlm", "llava": "llava_next", "gemma": "gemma3", "internvl": "internvl"}
        families |= {"qwen2.5": "qwen2_5_vl", "qwen3": "qwen3_vl"}
        said = " ".join(line for _, lines in BLOCKS for line in lines)
        for preset in named("quick_start_config"):
            name = str(read_mapping(resource("quick_start_config", preset)).get("mllm"))
            family = next((family for start, family in families.items() if preset.startswith(start)), None)
            if family and (preset in said or name in said):
                HubCache(self.home / "hub", name).plant(getattr(tiny_models, family)(self.home / "tiny" / preset))

    def _datasets(self, shop: str) -> None:
        items, base = demo_world(1, items=40, users=1, cold=0).items, self.base
        pictures = [render(item, number) for number, item in enumerate(items)]
        titles = [item.title for item in items]

        def paint(folder: Path, name: Callable[[int], object], kind: str) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for number in NUMBERS:
                pictures[number].convert("RGB").save(folder / f"{name(number)}.{kind}")

        def lines(path: Path, rows: Iterable[str]) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{row}\n" for row in rows))

        for name, user, item, kind in (
            ("demo", user_id, shown, "png"),
            ("demo-7", user_id, shown, "png"),
            ("ml-100k-posters", (1).__add__, (1).__add__, ""),
        ):
            folder = base / "dataset" / name
            rows = [f"{user(u)}\t{item(n)}\t{time}" for u, n, time in ROWS]
            lines(folder / f"{name}.inter", ["user_id:token\titem_id:token\ttimestamp:float", *rows])
            rows = [f"{item(n)}\t{titles[n]}\t" + f"images/{item(n)}.png" * (kind == "png") for n in NUMBERS]
            lines(folder / f"{name}.item", ["item_id:token\ttitle:token_seq\timage:token", *rows])
            if kind:
                paint(folder / "images", item, kind)
        paint(base / "posters", (1).__add__, "jpg")
        lines(base / "log" / "log.csv", ["user_id,item_id,timestamp", *(f"{user_id(u)},{n},{t}" for u, n, t in ROWS)])
        lines(
            base / "log" / "items.csv", ["item_id,title,image", *(f"{n},{titles[n]},images/{n}.png" for n in NUMBERS)]
        )
        paint(base / "log" / "images", str, "png")
        games = base / "Video_Games"
        jsonl(games / "Video_Games.jsonl", (review(f"U{u}", f"B{n}", 1000 * time) for u, n, time in ROWS))
        pages = (product(f"B{n}", titles[n], [{"large": f"{shop}/{n + 1}.jpg", "variant": "MAIN"}]) for n in NUMBERS)
        jsonl(games / "meta_Video_Games.jsonl", pages)
        lists = {f"{u}": [f"{n}" for user, n, _ in ROWS if user == u] for u in range(24)}
        write_microlens(base / "MicroLens-50k", lists, {f"{n}": titles[n] for n in NUMBERS})
        paint(base / "MicroLens-50k" / "covers", str, "jpg")
        lines(base / "ml-1m" / "ratings.dat", (f"{u + 1}::{n + 1}::5::{time}" for u, n, time in ROWS))
        lines(base / "ml-1m" / "movies.dat", (f"{n + 1}::{titles[n]} (1999)::Comedy" for n in NUMBERS))
        lines(base / "my.yaml", ["mllm: Qwen/Qwen2.5-VL-7B-Instruct"])
        shutil.copy(self.code / "properties" / "prompt" / "product.yaml", base / "my-style.yaml")
        for _, text in blocks("yaml"):
            if text.startswith("# full.yaml"):
                (base / "full.yaml").write_text(text)

    def page(self, where: str) -> Path:
        """Return the folder in which a page is read: what the first run left, for the page to change."""
        folder = self.home / re.sub(r"\W+", "-", where.partition(":")[0])
        if not folder.exists():
            shutil.copytree(self.base, folder)
            for path in self.code.iterdir():
                (folder / path.name).symlink_to(path)
        return folder

    def run(self, command: str, folder: Path) -> None:
        """Run a command, which must succeed: a plain call of the program in this process, everything else by bash."""
        os.chdir(folder)
        if PLAIN.fullmatch(command):
            (words,) = words_of(command)
            assert main(words) == 0
        else:
            subprocess.run(["bash", "-e", "-o", "pipefail", "-c", command], check=True)

    def serve(self, command: str, folder: Path, port: int) -> None:
        """Start a server, and wait until it listens."""
        with (folder / "server.log").open("wb") as log:
            process = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=folder, stdout=log, stderr=log)
        self.servers.append(process)
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    home = tmp_path_factory.mktemp("reader")

    class Shop(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    paths = ":".join(str(home / "checkout" / name) for name in ("", "tests", "tools"))
    with (
        serving_hub() as hub,
        listening(partial(Shop, directory=home / "base" / "posters")) as shop,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(sys, "argv", ["recbole-mllm"])
        patch.chdir(home)
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
        for name, value in {"HF_HUB_CACHE": home / "hub", "HOME": home, "PYTHONPATH": paths}.items():
            patch.setenv(name, str(value))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        found = Reader(home, hub, shop)
        yield found
        for process in found.servers:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def ports():
    return {}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("where", "number"), COMMANDS)
def test_a_command_of_the_docs_runs(where, number, reader, ports):
    lines = dict(BLOCKS)[where]
    if reason := skipped(lines[number]):
        pytest.skip(reason)
    if where not in ports:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports[where] = free.getsockname()[1]
    for n, line in enumerate(lines[: number + 1]):  # one command alone: those above it first
        if (where, n) not in reader.done and not skipped(line):
            reader.done.add((where, n))
            follow(line, reader, reader.page(where), ports[where])


def follow(line: str, reader: Reader, folder: Path, port: int) -> None:
    """Run a line, and look for the files that it says it writes."""
    command = stand_in(line, port=port, hub=reader.hub.url)
    if "RUN_ID" in command:
        results = next((word.split("/runs")[0] for word in command.split() if "/runs/" in word), "results/demo")
        command = command.replace("RUN_ID", next((folder / results / "runs").glob("MLLMMSR-2024-*")).name)
    if "TAG" in command:
        command = command.replace("TAG", next(folder.glob("dataset/demo/demo.*.isum")).name.split(".")[1])
    if SERVER.search(line):
        reader.serve(command, folder, port)
        return
    before = time.time()
    reader.run(command, folder)
    for words in words_of(line):
        found = [FILES[option].format(value) for option, value in pairwise(words) if option in FILES]
        if words[:1] == ["benchmark"] and "--output_dir" not in words:
            found.append(f"results/{words[words.index('--dataset') + 1]}/leaderboard.html")
        for path in (folder / name for name in found):
            assert max(p.stat().st_mtime for p in (path, *path.rglob("*"))) > before - 1, path
        if "--push-to-hub" in words:
            name = words[words.index("--push-to-hub") + 1]
            assert any(repository.endswith(name) for repository in reader.hub.files)
