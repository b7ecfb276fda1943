"""What checks share when they measure: one way of generating, saving, tracing, tokenizing, whoever wrote the model."""
