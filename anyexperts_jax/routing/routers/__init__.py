"""Where router logits come from, as pure functions: one linear map, one a modality, a hypernetwork a modality (EvoMoE).

A token's modality id says which modality's weights it reads. Everything is float32 whatever x's dtype.
"""
