"""From Hugging Face and back: whole folders, written aside, verified, then given their name."""
