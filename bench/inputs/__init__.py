"""What users write: paths, words, and the error for what is not allowed."""
