"""By what a comparison's result file is known: to the report, which reads it and needs nothing else of this room."""

SCHEMA_VERSION = 1
RESULT_KEY = "tournament_version"
"""Every result has it, near its beginning: what lacks it is not written over."""
RESULT_NAME = "tournament.json"
"""Under this name in a run directory the run's report shows it."""
