"""EvoMoE (arXiv 2505.23830): experts evolved from one dense FFN, and a router trained for them, stage by stage."""
