"""Makes encoders from images without labels, and exports them."""
