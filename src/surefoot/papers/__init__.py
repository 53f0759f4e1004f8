"""Each source's experiments and published numbers, as data: one file a paper."""
