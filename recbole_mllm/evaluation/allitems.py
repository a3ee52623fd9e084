# SHIM DEEPEST,KEPT_PAIRS,AllItems -> recbole_mllm.evaluation.full_ranking
from recbole_mllm.evaluation.full_ranking import DEEPEST, KEPT_PAIRS, AllItems  # noqa: F401
