"""Item and user summaries, and the store that keeps every answer."""
