"""RecBole-facing models."""
