"""Knowledge distillation from the teacher's U-Net into a student's."""
