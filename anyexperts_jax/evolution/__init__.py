"""EvoMoE (arXiv 2505.23830): evolves experts from one dense FFN and trains a router for them, in stages."""
