"""The README of an export: what it is, and how it is served and asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from recbole_mllm.prompts import Style

_SERVE = {
    "model": """\
```bash
transformers serve "$PWD" --port 8000                                  # its name is this folder's full path
vllm serve "$PWD" --served-model-name my-recommender --port 8000
python -m sglang.launch_server --model-path "$PWD" --served-model-name my-recommender --port 8000
```
""",
    "adapter": """\
This is a PEFT adapter: its base model is `{base}` ({base_identity}), which a server loads itself.

```bash
vllm serve {base} --enable-lora --lora-modules my-recommender="$PWD" --port 8000
```

`transformers serve` takes no adapter: for it, and for typed decisions, `recbole-mllm export … --merge` writes a
model that stands alone.
""",
}
_README = """\
# A recommender: would this user take this item?

Written by {written_by} from the checkpoint `{checkpoint}`.

| | |
|---|---|
| base model | `{base}` |
| its weights | `{base_identity}`, {dtype} |
| fine-tuning | {finetune} |
| prompt style | `{prompt_style}`, {prompt_order}{images} |

## Serving

{serve}
Score with it: `--mllm=server:NAME@http://localhost:8000/v1 --finetune=none --prompt_style={prompt_style} \
--prompt_order={prompt_order}`. Serve in the precision above, or scores differ by its rounding.

## Asking

{asking}"""
_DECISION = """\
`decision_template.jinja` renders the prompt of training, token for token; checked when this was written. A typed
decision (`POST /v1/systemone`) is answered with P({yes} | {yes} or {no}) in `answers.take.noul`:

```json
{body}
```

`image` and `assets` are left out for an item without one.
"""
_LOGPROBS = """\
There is no `decision_template.jinja`, as none renders the prompt of training for this model: {why}.
A chat completion with `max_tokens: 1`, `logprobs: true` and `top_logprobs: 20` tells how likely {yes} and {no} are.
"""


_FOUR_BITS = {
    "model": """\
Its linear layers hold what the four bits (NF4) of the base model in training stand for, with the adapter added: served
in the precision above, it scores as that run did.
""",
    "adapter": """\
The base model was loaded in four bits in training (bitsandbytes: NF4, double quantisation); behind a server that loads
it whole, scores differ by the rounding of those bits. `recbole-mllm export … --merge` keeps the rounded weights.
""",
}


def readme(about: Mapping[str, Any], style: Style, why: str = "") -> str:
    """Return the page for an export that `about` describes; `why` it has no template, if it has none."""
    state = {"title": "Red mug", "preference": "The user likes red.", "image": "<image-1>"}
    asset = {"<image-1>": {"type": "image", "format": "png", "data_base64": "…"}}
    body = {"model": "NAME", "state": state, "questions": {"take": {"type": "noul"}}, "assets": asset}
    asking = (_DECISION if about["decision_template"] else _LOGPROBS).format(
        yes=style.answer_yes, no=style.answer_no, why=why, body=json.dumps(body, ensure_ascii=False, indent=2)
    )
    serve = _SERVE[about["kind"]].format(**about)
    if about["finetune"] == "qlora":
        serve += f"\n{_FOUR_BITS[about['kind']]}"
    images = ", with the item's image" if about["use_image"] else ", without images"
    return _README.format(**about, images=images, serve=serve, asking=asking)
