"""A dense model is split into experts and self-distilled to budgets: do tokens of unequal budgets beat a static k?"""
