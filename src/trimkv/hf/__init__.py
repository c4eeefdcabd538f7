"""What is known here of stock transformers models: where their attention is, how it is shaped, how they are called."""
