"""How good an encoder and an index are, judged through a collection."""
