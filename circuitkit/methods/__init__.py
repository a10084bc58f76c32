"""From a model and a task to a score per edge; one file per method."""
