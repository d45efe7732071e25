"""From the images of a source to the parts and segments of a collection."""
