"""Training, generation, comparison and diagnosis of the reference models, over transformers.Trainer."""
