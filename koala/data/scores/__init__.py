"""Scores of images and captions that the stage `score` computes: a file for each kind."""
