"""Routers as pure functions: one linear map, one linear map per modality, one hypernetwork per modality (EvoMoE).

A token's modality id selects the weights of its modality. Everything is float32, whatever x's dtype.
"""
