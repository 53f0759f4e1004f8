"""The laboratory: what is trained, by which runs, where, and what the results mean."""
