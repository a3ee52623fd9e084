"""The stages of pretraining, each from files to files, so that one can be done again alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from subprocess import Popen
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mllm.demo.attributes import FIELDS, VALUES, VISIBLE
from tiny_mllm import language, network
from tiny_mllm.learning import Learner, caption_accuracy, judge, progress, slot_noise
from tiny_mllm.pictures import Pictures, jittered, load_pictures
from tiny_mllm.samples import Maker, Sample
from tiny_mllm.settings import LOG, Budget, Places

EVERY = 50


def tokenizer(places: Places, budget: Budget) -> None:
    """Train the tokenizer on the texts of all tasks and save the processor."""
    language.save_processor(_corpus(Random(budget.seed), 3000), places.model)
    LOG.info("tokenizer: %d tokens", len(language.load_tokenizer(places.model)))


def _corpus(rng: Random, count: int) -> Iterator[str]:
    """Yield the texts the tokenizer is trained on: those of the summaries, and all words in random orders."""
    from recbole_mllm.common.prompts import (
        fused_summary_prompt,
        image_summary_prompt,
        recommend_prompt,
        text_summary_prompt,
    )
    from recbole_mllm.demo.attributes import draw_item
    from tiny_mllm import sentences
    from tiny_mllm.samples import PICTURE, summary_step

    style = language.demo_style()
    for _ in range(count):
        prompt, preference = summary_step(style, rng)
        item = draw_item(rng, reserved=False)
        said, title = sentences.preference_text(preference), item.title
        yield from (prompt.text, f" {said}", f" {sentences.caption(item)}", f" {sentences.text_summary(item)}")
        for ask in (
            image_summary_prompt(style, PICTURE),
            text_summary_prompt(style, title),
            fused_summary_prompt(style, sentences.caption(item), sentences.text_summary(item)),
            recommend_prompt(style, said, title, PICTURE),
            recommend_prompt(style, style.cold, title, None),
        ):
            yield from ask.text.split("<image>")
        yield from (f" {sentences.fused_summary(item)}", f" {style.answer_yes}", f" {style.answer_no}")
        yield language.vocabulary_words(rng)


def vision(places: Places, budget: Budget) -> None:
    """Teach the vision tower that patch row r carries visible attribute r; the reading head is thrown away."""
    torch.set_num_threads(1)
    model = _fresh(places, budget)
    pictures, generator = load_pictures(places.images, budget), _generator(budget, 0)
    words = {(name, value): i for i, (name, value) in enumerate((f, v) for f in FIELDS for v in VALUES[f])}
    head = nn.Linear(network.VISION_WIDTH, len(words))
    tower = model.model.vision_tower
    learner = Learner(
        [*tower.parameters(), *head.parameters()], budget.vision_lr, budget.vision_steps, warm_up=80, decay=0.03
    )
    for _ in _steps("vision", budget.vision_steps, lambda: f"{learner} {_read(model, head, pictures, words)}", 200):
        numbers = pictures.draw(budget.vision_batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(network.seen(model, jittered(pictures.normalised(numbers), generator))).float()
        learner.backward(read=F.cross_entropy(logits.flatten(0, 1), pictures.values(words, numbers).flatten()))
        learner.step()
    _save(tower, places.state("vision"))


@torch.no_grad()
def _read(model: Any, head: nn.Linear, pictures: Pictures, words: dict[tuple[str, str], int]) -> dict[str, float]:
    numbers = pictures.unseen
    logits = head(network.seen(model, pictures.normalised(numbers))).unflatten(1, (len(VISIBLE), -1)).mean(2)
    hits = logits.argmax(-1) == pictures.values(words, numbers)[:, ::4]
    return {name: round(hits[:, row].float().mean().item(), 3) for row, name in enumerate(VISIBLE)}


def lm(places: Places, budget: Budget) -> None:
    """Teach the language model every task on text alone; an image's slots hold its words, with noise."""
    torch.set_num_threads(1)
    model, maker, generator = _fresh(places, budget), _maker(places, budget, 1), _generator(budget, 1)
    learner = Learner(network.language_parameters(model), budget.lm_lr, budget.lm_steps, warm_up=100, decay=0.05)
    for step in _steps("lm", budget.lm_steps, lambda: f"{learner} {progress(model, maker)}", EVERY):
        if step == budget.lm_two_threads_from:
            torch.set_num_threads(2)
        learner.backward(long=judge(model, _long(maker, budget)).loss)
        short = [maker.match() for _ in range(budget.matches)] + [maker.caption() for _ in range(budget.captions)]
        short += _about_titles(maker, budget)
        learner.backward(short=judge(model, short, noise=slot_noise(model, short, generator)).loss)
        learner.step()
        if step % 400 == 399:
            _save(model, places.state("lm-partial"))
    _save(model, places.state("lm"))


def _long(maker: Maker, budget: Budget) -> list[Sample]:
    """Return the samples that list several items; kept apart, as padding the rest to their length would cost much."""
    summaries = [maker.summary() for _ in range(budget.summaries)]
    return summaries + [maker.title_match() for _ in range(budget.title_matches)]


def _about_titles(maker: Maker, budget: Budget) -> list[Sample]:
    told = [maker.text_summary() for _ in range(budget.text_summaries)]
    return told + [maker.fused_summary() for _ in range(budget.fused_summaries)]


def align(places: Places, budget: Budget) -> None:
    """Teach the projector alone to map patch row r to the language model's own word for attribute r."""
    torch.set_num_threads(2)
    model, maker, generator = _fresh(places, budget), _maker(places, budget, 2), _generator(budget, 2)
    model.load_state_dict(torch.load(places.state("lm")))
    model.model.vision_tower.load_state_dict(torch.load(places.state("vision")))
    pictures = load_pictures(places.images, budget)
    words = model.get_input_embeddings().weight.detach()
    chunks = torch.arange(len(pictures.items)).split(500)
    with torch.no_grad():
        states = torch.cat([network.seen(model, pictures.normalised(chunk.tolist())) for chunk in chunks])
    projector = model.model.multi_modal_projector
    learner = Learner(projector.parameters(), budget.align_lr, budget.align_steps, warm_up=80, decay=0.01)
    for _ in _steps("align", budget.align_steps, lambda: str(learner), 500):
        numbers = pictures.draw(budget.align_batch, generator)
        wanted = words[pictures.values(maker.tokens, numbers)]
        learner.backward(align=((projector(states[numbers]) - wanted) / words.std()).pow(2).mean())
        learner.step()
    _save(model, places.state("align"))
    LOG.info("align: captions %s", caption_accuracy(model, maker, pictures))


def joint(places: Places, budget: Budget) -> None:
    """Train everything on real images; the projector is still held to the words."""
    torch.set_num_threads(2)
    model, maker, generator = _fresh(places, budget), _maker(places, budget, 3), _generator(budget, 3)
    model.load_state_dict(torch.load(places.state("align")))
    pictures = load_pictures(places.images, budget)
    learner = Learner(model.parameters(), budget.joint_lr, budget.joint_steps, warm_up=50, decay=0.05)
    for _ in _steps("joint", budget.joint_steps, lambda: f"{learner} {progress(model, maker)}", EVERY):
        learner.backward(long=judge(model, _long(maker, budget)).loss)
        learner.backward(loss=judge(model, _about_titles(maker, budget)).loss * 0.2)
        numbers = pictures.draw(budget.matches + budget.captions, generator)
        items = [pictures.items[n] for n in numbers]
        samples = [maker.match(item) for item in items[: budget.matches]]
        samples += [maker.caption(item) for item in items[budget.matches :]]
        shown = [n for n, sample in zip(numbers, samples, strict=True) if sample.slots]
        images = network.projected(model, jittered(pictures.normalised(shown), generator))
        held = _distance(model, images, pictures.values(maker.tokens, shown)) * budget.align_weight
        learner.backward(short=judge(model, samples, images).loss, held=held)
        learner.step()
    LOG.info("joint: captions %s", caption_accuracy(model, maker, pictures))
    _save(model, places.state("joint"))


def _distance(model: Any, images: Tensor, tokens: Tensor) -> Tensor:
    words: Tensor = model.get_input_embeddings().weight.detach()
    return ((images - words[tokens]) / words.std()).pow(2).mean()


def export(places: Places, budget: Budget, folder: Path) -> None:
    """Write the processor and the weights in half precision to `folder`."""
    model = _fresh(places, budget)
    model.load_state_dict(torch.load(places.state("joint")))
    model.generation_config.pad_token_id = language.PAD
    model.half().save_pretrained(places.model)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for file in sorted(places.model.iterdir()):
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / file.name).chmod(0o644)
    LOG.info("export: %.2f MB in %s", sum(file.stat().st_size for file in folder.iterdir()) / 1e6, folder)


def everything(places: Places, budget: Budget, folder: Path, start_vision: Callable[[], Popen[bytes]]) -> None:
    """Run all stages; vision, which needs no text, in a process of its own beside the language model."""
    tokenizer(places, budget)
    load_pictures(places.images, budget)
    beside = start_vision()
    try:
        lm(places, budget)
        if beside.wait() != 0:
            raise RuntimeError(f"the vision stage failed; see {places.work / 'vision.log'}")
    finally:
        if beside.poll() is None:
            beside.terminate()
    align(places, budget)
    joint(places, budget)
    export(places, budget, folder)


def _fresh(places: Places, budget: Budget) -> Any:
    return network.build(len(language.load_tokenizer(places.model)), budget.seed)


def _maker(places: Places, budget: Budget, stage: int) -> Maker:
    rng = Random(1000 * budget.seed + stage)
    return Maker(language.load_tokenizer(places.model), language.demo_style(), rng)


def _generator(budget: Budget, stage: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * budget.seed + stage)


def _save(module: Any, path: Path) -> None:
    scratch = path.with_suffix(".tmp")
    torch.save(module.state_dict(), scratch)
    scratch.replace(path)


def _steps(name: str, count: int, report: Callable[[], str], every: int) -> Iterator[int]:
    """Yield the steps; log `report` after every so many and after the last."""
    start = time.perf_counter()
    for step in range(count):
        yield step
        if (step + 1) % every == 0 or step + 1 == count:
            LOG.info("%s %d/%d %.0fs %s", name, step + 1, count, time.perf_counter() - start, report())
