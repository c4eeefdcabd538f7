"""What is kept, and who decides."""
