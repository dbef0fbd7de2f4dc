"""Edits of pictures that the model did not draw, by this project and by other methods, and how good they are."""
