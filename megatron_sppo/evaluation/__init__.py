"""The evaluation kit: players judged against each other, and what the field reads of it."""
