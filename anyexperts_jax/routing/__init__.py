"""The routing policy: turns logits into a `RoutingPlan`. Pure functions of arrays, without parameters or a mesh."""
