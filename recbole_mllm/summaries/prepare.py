# SHIM Preferences,export_item_summaries,make_item_summaries -> recbole_mllm.summaries.preferences
# SHIM make_preferences,refresh -> recbole_mllm.summaries.preferences
# SHIM Stage,Summarizers,item_scribe,user_scribe -> recbole_mllm.summaries.generator
from recbole_mllm.summaries.generator import Stage, Summarizers, item_scribe, user_scribe  # noqa: F401
from recbole_mllm.summaries.preferences import (  # noqa: F401
    Preferences,
    export_item_summaries,
    make_item_summaries,
    make_preferences,
    refresh,
)
