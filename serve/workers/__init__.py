"""Several processes on one port: where each stands among them, and who minds them."""
