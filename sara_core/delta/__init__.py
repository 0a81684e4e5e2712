"""What a training learned, and the formats it is kept in."""
