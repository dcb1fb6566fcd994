"""What a model says after its weights or its keys and values were rounded, beside what it said before."""
