# SHIM rank_all -> recbole_mllm.evaluation.full_ranking
from recbole_mllm.evaluation.full_ranking import rank_all  # noqa: F401
