"""Measurements as pictures: what is drawn, in a terminal and as PNG."""
