"""A history too long for a model: the error says what helps, and it does."""

from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from planned_server import Planned, error, serving

from recbole_mllm.data.texts import Items
from recbole_mllm.endpoints import Endpoint
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Batch, Decoding, answers_of
from recbole_mllm.mllm.encode import ROOM
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.plan.counting import PlannedModel
from recbole_mllm.prompts import Prompt, Style, recommend_prompt
from recbole_mllm.resources import PROPERTIES
from recbole_mllm.settings import ServerSettings, Settings
from recbole_mllm.summaries.users import Plan, openings

SETTINGS = Settings.from_config(yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()))
STYLE = Style.from_mapping("demo", yaml.safe_load((PROPERTIES / "prompt" / "demo.yaml").read_text()))
FILMS = [f"f{n}" for n in range(60)]
TITLES = Items({film: f"A film of some name, part {film} (1994)" for film in FILMS}, {})
SHOWN = dict.fromkeys(FILMS, "A drama in a small town, with a dog.")


def asked(**changes):
    """Return the first prompt about a user who has seen all films, as the summaries' stage asks it."""
    settings = replace(SETTINGS.summary, **changes)
    return next(openings(STYLE, TITLES, SHOWN, Plan({"u": FILMS}, {"u": {len(FILMS)}}), settings, {}))


@pytest.fixture(scope="module")
def bundled():
    return HFModel("tiny", replace(SETTINGS.mllm, max_text_tokens=448), torch.device("cpu"))


@pytest.mark.parametrize(
    ("mode", "shorter"),
    [
        ({"summary_mode": "direct"}, {"max_history": 6}),
        ({"summary_mode": "recurrent", "block_size": 60}, {"block_size": 6}),
        ({"summary_mode": "recurrent", "block_size": 60}, {"max_history": 6}),
    ],
)
def test_a_history_too_long_for_the_model_is_told_the_setting_that_shortens_it(bundled, mode, shorter):
    with pytest.raises(UserError, match=f"a history .*first letters of its 120 texts.*smaller.*{next(iter(shorter))}"):
        bundled.encoder(asked(**mode))
    assert len(bundled.encoder(asked(**mode | shorter)).ids) <= bundled.encoder.max_text_tokens


def test_where_no_history_is_short_enough_only_room_helps(bundled, monkeypatch):
    monkeypatch.setattr(bundled.encoder, "max_text_tokens", 9)
    with pytest.raises(UserError, match="fixed wording, .*over max_text_tokens = 9 tokens; raise max_text_tokens"):
        bundled.encoder(asked(summary_mode="direct", max_history=9))


def test_a_server_that_finds_a_history_too_long_is_told_of_both_ways_out():
    settings = ServerSettings(4, 5.0, 2.0, None)
    too_long = Planned(lambda n, text: error(400, "maximum context length is 9 tokens"))
    with serving(too_long) as planned, pytest.raises(UserError, match="6 texts.*max_history.*longer context"):
        ServerModel(Endpoint("m", (planned.url,)), settings).write(
            Batch([asked(summary_mode="direct", max_history=3)], Decoding(9))
        )


@pytest.fixture
def narrow(bundled, monkeypatch):
    """The bundled model, of 512 positions, with all the text tokens one could ask for."""
    monkeypatch.setattr(bundled.encoder, "max_text_tokens", 10**6)
    assert bundled.encoder.positions == bundled.model.config.get_text_config().max_position_embeddings == 512
    return bundled


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def test_image_tokens_and_the_answer_count_against_the_models_positions(narrow, picture):
    image = narrow.encoder.image(picture)
    long = recommend_prompt(STYLE, "word " * 600, "a mug", picture)
    asked_now = narrow.encode([long])[0]
    assert len(asked_now.ids) <= 512 - ROOM and asked_now.ids.count(image.ids[0]) == len(image.ids)
    assert len(asked_now.ids) > 512 - ROOM - 8  # and all that there is is used
    example = narrow.examples([long], torch.ones(1), narrow.answers(STYLE))[0]
    assert len(example.ids) <= 512
    written = answers_of(narrow, [long], Decoding(200))[0]
    assert written.shortened and written.prompt_tokens + 200 <= 512
    planned = PlannedModel.of("tiny", replace(SETTINGS.mllm, max_text_tokens=10**6))
    assert planned.written(long, 1, 200).longest == written.prompt_tokens
    assert planned.written(long, 1).longest == len(asked_now.ids)


@pytest.mark.parametrize(
    ("room", "images", "helps", "useless"),
    [
        (
            500,
            0,
            "lower item_summary_tokens or user_summary_tokens, or take a model with more than 512",
            "images smaller",
        ),
        (48, 40, "make the images smaller, or take a model with more than 512 positions", "summary_tokens"),
    ],
)
def test_where_positions_are_too_few_the_error_says_what_helps(narrow, picture, room, images, helps, useless):
    prompt = Prompt("Describe this as well as you can. " * 3 + "<image>" * images, (picture,) * images)
    with pytest.raises(UserError, match=f"model's 512 positions, .*{helps}") as caught:
        narrow.encoder(prompt, room=room)
    assert useless not in str(caught.value) and "max_text_tokens" not in str(caught.value)


def test_a_history_too_long_for_the_positions_is_not_told_to_raise_max_text_tokens(narrow):
    with pytest.raises(UserError, match=r"history .*512 positions.*smaller max_history.*more than 512") as caught:
        narrow.encoder(asked(summary_mode="direct"))
    assert "max_text_tokens" not in str(caught.value)
