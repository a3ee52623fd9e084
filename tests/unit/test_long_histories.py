"""A history too long for a model: the error says what helps, and it does."""

from dataclasses import replace

import pytest
import torch
import yaml
from planned_server import Planned, error, serving

from recbole_mllm.data.texts import Items
from recbole_mllm.endpoints import Endpoint
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Batch, Decoding
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.prompts import Style
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
    with pytest.raises(UserError, match="tokens of fixed wording; raise it"):
        bundled.encoder(asked(summary_mode="direct", max_history=9))


def test_a_server_that_finds_a_history_too_long_is_told_of_both_ways_out():
    settings = ServerSettings(4, 5.0, 2.0, None)
    too_long = Planned(lambda n, text: error(400, "maximum context length is 9 tokens"))
    with serving(too_long) as planned, pytest.raises(UserError, match="6 texts.*max_history.*longer context"):
        ServerModel(Endpoint("m", (planned.url,)), settings).write(
            Batch([asked(summary_mode="direct", max_history=3)], Decoding(9))
        )
