"""Many models on the same candidates, and the leaderboard."""
