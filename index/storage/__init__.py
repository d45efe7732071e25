"""Collections on disk: manifest, segments, journal, and the one who writes them."""
