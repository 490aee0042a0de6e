"""Routing policy: logits in, `RoutingPlan` out. Pure functions of arrays; no parameters, no mesh."""
