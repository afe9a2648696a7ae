"""What the parties of a federation agree on and say to each other.

numpy and cryptography only: no torch, no Flower, no database.
"""
