"""The U-Net of a student: which of the teacher's blocks it keeps, its weights, its cost."""
