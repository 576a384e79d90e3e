"""Iterations of self-play as resumable stages, held-out evaluation and the report of a run."""
