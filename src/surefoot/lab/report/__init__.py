"""What a person sees of a study: one HTML page, and a summary in the terminal."""
