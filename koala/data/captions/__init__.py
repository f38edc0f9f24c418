"""New captions of kept images: the model that writes them, and how training reads them."""
