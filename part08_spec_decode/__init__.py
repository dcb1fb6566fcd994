"""Part 08: speculative decoding. Tokens are guessed, and one forward tells which guesses stay."""
