"""A small world with an exact physics and an oracle in the VLM's place, to run the whole method on a laptop CPU."""
