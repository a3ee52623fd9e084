"""Raw dumps to atomic files; no torch, no recbole."""
