"""The demonstration: a small model of handwritten digits, its training, and its sampling."""
