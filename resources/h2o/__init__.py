"""A network client of H2O LLM Studio: four calls, and what it takes to rely on them."""
