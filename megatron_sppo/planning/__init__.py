"""What a run will need before it is started: memory, time and traffic per rank, by arithmetic alone."""
