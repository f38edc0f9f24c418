"""How good a student is, beside its teacher and beside itself before distillation."""
