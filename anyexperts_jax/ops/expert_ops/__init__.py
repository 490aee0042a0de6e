"""The implementations of the expert ops, one `ExpertOps` each; `core.registries.IMPLEMENTATIONS` names them.

A module is imported when its implementation is first used, so that Pallas loads only where it runs.
"""
