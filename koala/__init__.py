"""koala: distil SDXL-class text-to-image models into small, fast students."""

__version__ = "0.1.0"
