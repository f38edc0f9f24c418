"""Metrics of image quality, a file each."""
