"""The routing policy: from logits to a `RoutingPlan`. Pure functions of arrays, without parameters or a mesh."""
