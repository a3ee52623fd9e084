"""A dataset's health: what is measured, what it means, and how it is shown."""
