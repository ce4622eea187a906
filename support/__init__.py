"""What a lesson need not open; README.md says what is where."""
