"""What a measurement is: verified first, timed alone, in processes that may die. See docs/measuring.md."""
