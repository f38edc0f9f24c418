"""Measurement of a student beside its teacher and beside itself before distillation."""
