"""PairRM: its checkpoint, its input texts, its network, and the judge around them."""
