"""Sharding: the device mesh, the rules from logical to mesh axes, and the shardings that follow from them."""
