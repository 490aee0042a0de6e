"""Where arrays live: the device mesh, the rules from logical to mesh axes, and the shardings they give."""
