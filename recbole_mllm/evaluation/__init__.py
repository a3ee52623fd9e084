"""Frozen candidates, protocols and statistics."""
