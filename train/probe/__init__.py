"""How good an encoder is, judged with labels."""
