"""What a program costs: its compiled text is read, for devices that may not be there."""
