"""How graphs are made smaller: recipes are data, `litert-quantizer` does the work."""
