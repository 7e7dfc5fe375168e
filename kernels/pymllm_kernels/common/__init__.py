"""What two or more operations use unchanged."""
