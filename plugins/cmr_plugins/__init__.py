"""Official plugins of CMR; they use only the public names of `cmr`."""
