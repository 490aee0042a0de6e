"""The implementations of the expert ops, one `ExpertOps` each; `core.registries.IMPLEMENTATIONS` lists them.

A module is imported on the first use of its implementation, so that Pallas loads only where it runs.
"""
