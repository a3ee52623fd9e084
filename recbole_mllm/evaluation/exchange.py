# SHIM is_export,read_candidates,write_candidates -> recbole_mllm.evaluation.candidates_file
from recbole_mllm.evaluation.candidates_file import is_export, read_candidates, write_candidates  # noqa: F401
