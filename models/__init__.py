"""What an image encoder is, and how to run one anywhere."""
