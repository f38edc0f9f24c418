"""Data stages, from a list of image URLs to latents: source, download, filter, encode."""
