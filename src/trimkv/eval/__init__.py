"""What a bounded cache costs in quality."""
