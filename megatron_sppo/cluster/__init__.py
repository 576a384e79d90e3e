"""A stage's work, done by a pool of workers: one in this process, or Ray actors on any number of nodes."""
