"""The demo world: captioned pictures of small scenes, with the true silhouettes of their objects."""
