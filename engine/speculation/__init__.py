"""Guessing what a sequence will say, so that one step of the model yields several tokens: who guesses, and whether it pays."""
